"""Continues a prompt with the artifact of a run."""

from collections.abc import Callable

from pqkv_cli.pipeline.prefixes import PrefixUse, attached_model, prompt_cache
from pqkv_cli.pipeline.start import Source
from pqkv_cli.reporter import Reporter
from pqkv_cli.runtime.cuda_graph import GraphRequest
from pqkv_cli.runtime.generate import GenerateSettings, Generation, generate


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
    settings = GenerateSettings(source.recipe.generation.max_new_tokens, temperature, source.recipe.seed, graph)
    with attached_model(source, reporter, force=force) as (attached, tokenizer):
        cache = None
        if prefixes is not None:
            cache = prompt_cache(attached, tokenizer, prompt, settings.max_new_tokens, prefixes, reporter)
        return generate(attached, tokenizer, prompt, settings, on_text, cache)
