"""Continues a prompt with the artifact of a run."""

from collections.abc import Callable

from pqkv_cli.artifact.store import open_artifact
from pqkv_cli.models.prefix import whole_ids
from pqkv_cli.pipeline.loading import device_of, open_model
from pqkv_cli.pipeline.prefixes import PrefixUse, prompt_cache
from pqkv_cli.pipeline.start import Source
from pqkv_cli.reporter import Reporter
from pqkv_cli.runtime.attach import attach
from pqkv_cli.runtime.cuda_graph import GraphRequest
from pqkv_cli.runtime.generate import GenerateSettings, Generation, check_room, generate


def generate_from(
    source: Source,
    prompt: str,
    reporter: Reporter,
    *,
    temperature: float = 0.0,
    force: bool = False,
    graph: GraphRequest = "auto",
    on_text: Callable[[str], None] | None = None,
    prefixes: PrefixUse | None = None,
) -> Generation:
    """Continue `prompt` over the quantized cache of `source`; `on_text` receives the text as it comes.

    With `prefixes` the prompt begins with the longest stored prefix that serves it.

    Raises
    ------
    ArtifactError
        If the artifact is damaged or, without `force`, of another model.
    DataError
        If the prompt does not fit the model.
    CacheError
        If a captured step was asked for and cannot be.
    """
    # Before the model: a damaged artifact shows at once.
    artifact = open_artifact(source.artifact, device_of(source.recipe))
    model, tokenizer = open_model(source.recipe, reporter)
    settings = GenerateSettings(source.recipe.generation.max_new_tokens, temperature, source.recipe.seed, graph)
    if force:
        reporter.note("--force: the artifact is used whatever model it was made for")
    with attach(model, artifact, force=force) as attached:
        cache = None
        if prefixes is not None:
            check_room(model, len(whole_ids(tokenizer, prompt)), settings.max_new_tokens)
            cache = prompt_cache(attached, tokenizer, prompt, prefixes, reporter)
        return generate(attached, tokenizer, prompt, settings, on_text, cache)
