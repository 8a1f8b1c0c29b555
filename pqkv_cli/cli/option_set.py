"""Gives every verb all of its options: its own, as one frozen dataclass; those of settings, as the recipe declares them.

Knows typer's ways and what words mean in a recipe; no verb.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from pqkv_cli.cli.log_setup import LOG_FORMATS
from pqkv_cli.cli.options import LogFormatOption, QuietOption
from pqkv_cli.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from pqkv_cli.recipe import Recipe
    from pqkv_cli.setting import Setting


T = TypeVar("T")

# What a command line changes in a recipe, by dotted names such as ``calibration.samples``; None leaves a setting as it is.
Changes = dict[str, Any]

# The parameter of a verb that takes options of settings. Those of the recipe's sections stand in its place; those of the recipe
# itself (seed, device, dtype) come late, before how the verb talks.
CHANGES = "changes"
_TALK = "json_target"


def takes(options: Callable[..., T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Return a decorator: a verb of one `options` object becomes a function with a parameter per field, as typer reads it."""
    hints = get_type_hints(options, include_extras=True)

    def decorate(verb: Callable[[T], None]) -> Callable[..., None]:
        @functools.wraps(verb)
        def wrapper(**words: Any) -> None:
            verb(options(**words))

        wrapper.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(
                    f.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if f.default is MISSING else f.default,
                    annotation=hints[f.name],
                )
                for f in fields(options)  # type: ignore[arg-type]
            ]
        )
        wrapper.__annotations__ = {f.name: hints[f.name] for f in fields(options)}  # type: ignore[arg-type]
        del wrapper.__wrapped__  # typer would read the verb's own signature
        return wrapper

    return decorate


def with_all_options(name: str, verb: Callable[..., None]) -> Callable[..., None]:
    """Return the verb called `name` with the options of the recipe's settings that it takes, and those that every verb has."""
    return with_common_options(with_recipe_options(name, verb))


def with_common_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Return `verb` with the options that every verb has and none needs to know: how stderr is written.

    They are obeyed from the first word on (`log_setup.wanted_voice`), before typer has read a line that may be wrong; here they
    are declared and checked.
    """

    @functools.wraps(verb)
    def wrapper(*, log_format: str, quiet: bool, **words: Any) -> None:
        if log_format not in LOG_FORMATS:
            nearest = did_you_mean(log_format, LOG_FORMATS)
            raise UsageError(f"--log-format is {log_format!r}{nearest}; expected one of {', '.join(LOG_FORMATS)}")
        verb(**words)

    signature, hints = inspect.signature(verb), get_type_hints(verb, include_extras=True)
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[p.name]) for p in signature.parameters.values()]
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, default, annotation in (("log_format", "text", LogFormatOption), ("quiet", False, QuietOption))
    ]
    wrapper.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *common]}
    del wrapper.__wrapped__  # typer would read the verb's own signature
    return wrapper


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
