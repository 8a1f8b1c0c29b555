"""Options of the recipe's settings, as the recipe declares them, and what their words mean in a recipe. Knows no verb."""

import inspect
from collections.abc import Callable
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

if TYPE_CHECKING:
    from pqkv_cli.recipe import Recipe
    from pqkv_cli.setting import Setting

# What a command line changes in a recipe, by dotted names such as ``calibration.samples``; None leaves a setting as it is.
Changes = dict[str, Any]

# The parameter of a verb that takes options of settings. Those of the recipe's sections stand in its place; those of the recipe
# itself (seed, device, dtype) come late, before how the verb talks.
CHANGES = "changes"
_TALK = "json_target"


def with_recipe_options(name: str, verb: Callable[..., None], recipe: "type[Recipe] | None" = None) -> Callable[..., None]:
    """Return the verb called `name` with an option for each setting that it takes, instead of its parameter `changes`.

    A verb without that parameter takes none, and comes back as it is. `recipe` is the model whose settings are meant.
    """
    signature = inspect.signature(verb)
    if CHANGES not in signature.parameters:
        return verb
    options = recipe_options(name, recipe)

    def wrapper(**words: Any) -> None:
        changes = {dotted: in_recipe(dotted, words.pop(option.name)) for dotted, option in options.items()}
        verb(changes=changes, **words)

    parameters = _placed(signature, options)
    wrapper.__doc__ = verb.__doc__
    wrapper.__annotations__ = {each.name: each.annotation for each in parameters}
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return wrapper


def recipe_options(verb: str, recipe: "type[Recipe] | None" = None) -> dict[str, inspect.Parameter]:
    """Return the options of settings that `verb` takes, as typer reads them, by the dotted names of the settings."""
    from pqkv_cli.recipe import Recipe, setting_fields, settings

    recipe = recipe or Recipe
    fields = setting_fields(recipe)
    return {
        dotted: inspect.Parameter(
            dotted.replace(".", "_"),
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_option(setting, _word_type(fields[dotted].annotation, str(setting.option))),
        )
        for dotted, setting in settings(recipe).items()
        if verb in setting.verbs
    }


def in_recipe(dotted: str, word: Any) -> object:
    """Return what `word`, given for the setting `dotted`, is in a recipe: itself, but for the settings named here."""
    if word is None:
        return None
    match dotted:
        case "calibration.data":
            from pqkv_cli.pipeline.start import text_references

            return text_references(word)
        case "evaluation.data":
            from pqkv_cli.pipeline.start import file_reference

            return file_reference(word)
        case "calibration.fisher":
            return int(word)
    return word


def _placed(signature: inspect.Signature, options: dict[str, inspect.Parameter]) -> list[inspect.Parameter]:
    """Return the parameters of a verb with `options` among them, in the order in which its help lists them."""
    own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in signature.parameters.values()]
    names = [each.name for each in own]
    here, late = names.index(CHANGES), names.index(_TALK) if _TALK in names else len(names)
    of_sections = [option for dotted, option in options.items() if "." in dotted]
    of_recipe = [option for dotted, option in options.items() if "." not in dotted]
    return [*own[:here], *of_sections, *own[here + 1 : late], *of_recipe, *own[late:]]


def _word_type(annotation: Any, option: str) -> Any:
    """Return the type of a word on the command line for a setting of the type `annotation`."""
    if "/" in option:  # a flag that can be turned off, too
        return bool
    is_union = get_origin(annotation) in (Union, UnionType)
    kind = next(each for each in get_args(annotation) if each is not NoneType) if is_union else annotation
    if get_origin(kind) is Literal:
        return type(get_args(kind)[0])
    return list[str] if get_origin(kind) is tuple else kind


def _option(setting: "Setting", kind: Any) -> Any:
    """Return the annotation from which typer makes the option of `setting`."""

    def offered(incomplete: str) -> list[str]:
        return [word for word in setting.offers if word.startswith(incomplete)]

    is_repeated = kind == list[str]
    return Annotated[
        kind | None,
        typer.Option(
            setting.option,
            metavar=setting.metavar or ("NAME" if kind in (str, list[str]) else None),
            help=setting.help.removesuffix(".") + "; may be repeated." if is_repeated else setting.help,
            autocompletion=offered if setting.offers else None,
        ),
    ]
