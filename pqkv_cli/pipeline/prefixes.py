"""Stores texts that a model has read, and lets prompts begin with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pqkv_cli.artifact.store import open_artifact
from pqkv_cli.cache.cache import QuantizedCache
from pqkv_cli.errors import DataError
from pqkv_cli.hf.names import cache_argument
from pqkv_cli.models.prefix import whole_ids
from pqkv_cli.pipeline.loading import device_of, open_model
from pqkv_cli.pipeline.start import Source
from pqkv_cli.reporter import Reporter
from pqkv_cli.runtime.attach import Attached, attach
from pqkv_cli.runtime.generate import check_room
from pqkv_cli.runtime.prefix_index import StoredPrefix
from pqkv_cli.runtime.prefixes import PrefixStore


@dataclass(frozen=True, slots=True)
class PrefixUse:
    """Where a prompt's prefix may come from, and whether the prompt is stored there."""

    store: PrefixStore
    save: bool = False


@dataclass(frozen=True, slots=True)
class SavedText:
    """A text that was stored, and how many of its tokens were there already and needed no reading."""

    prefix: StoredPrefix
    num_restored_tokens: int


def save_text(source: Source, text: str, store: PrefixStore, reporter: Reporter, *, force: bool = False) -> SavedText:
    """Let the model of `source` read `text`, from where a stored prefix ends, and store it.

    Raises
    ------
    ArtifactError
        If the artifact is damaged or, without `force`, of another model.
    DataError
        If the text does not fit the model.
    CacheError
        If it cannot be stored.
    """
    with attached_model(source, reporter, force=force) as (attached, tokenizer):
        ids = whole_ids(tokenizer, text)
        check_room(attached.model, len(ids), 1)
        cache, num_restored = store.longest_prefix(attached, ids, tokenizer=tokenizer)
        with reporter.progress("read"):
            _read(attached, cache, ids)
        return SavedText(store.save(attached, cache, ids, tokenizer=tokenizer), num_restored)


@contextmanager
def attached_model(source: Source, reporter: Reporter, *, force: bool) -> Iterator[tuple[Attached, Any]]:
    """Lend the model of `source`, attached to its artifact, and the tokenizer.

    Raises
    ------
    ArtifactError
        If the artifact is damaged or, without `force`, of another model.
    """
    # Before the model: a damaged artifact shows at once.
    artifact = open_artifact(source.artifact, device_of(source.recipe))
    model, tokenizer = open_model(source.recipe, reporter)
    if force:
        reporter.note("--force: the artifact is used whatever model it was made for")
    with attach(model, artifact, force=force) as attached:
        yield attached, tokenizer


def prompt_cache(
    attached: Attached, tokenizer: Any, prompt: str, num_new: int, use: PrefixUse, reporter: Reporter
) -> QuantizedCache:
    """Return a cache with the longest stored prefix of `prompt`, an empty one if there is none; its last token is never in it.

    To be stored, the prompt is read up to its last token. So the same prompt goes on from the same cache next time.

    Raises
    ------
    DataError
        If the prompt and `num_new` tokens do not fit the model.
    """
    ids = whole_ids(tokenizer, prompt)
    check_room(attached.model, len(ids), num_new)
    cache, num_restored = use.store.longest_prefix(attached, ids, tokenizer=tokenizer)
    told = f"{num_restored} of the {len(ids)} tokens of the prompt come from {use.store.directory}"
    reporter.note(told if num_restored else f"no prefix in {use.store.directory} serves this prompt")
    if use.save and num_restored < len(ids) - 1:
        _read(attached, cache, ids[:-1])
        stored = use.store.save(attached, cache, ids[:-1], tokenizer=tokenizer)
        reporter.note(f"the prompt is stored as {stored.key}: {stored.num_tokens} tokens, {stored.own_bytes} bytes of its own")
    return cache


def read_text_file(path: Path) -> str:
    """Return the text of a file, as it is.

    Raises
    ------
    DataError
        If it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; expected a text file: check its name and rights") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start}); expected text: convert it, as with iconv -t utf-8"
        ) from error
    if not text.strip():
        raise DataError(f"{path} is empty; expected a text to store")
    return text


@torch.no_grad()
def _read(attached: Attached, cache: QuantizedCache, ids: list[int]) -> None:
    """Let the model read what `cache` lacks of `ids`."""
    model, new = attached.model, ids[cache.get_seq_length() :]
    if new:
        tokens = torch.tensor([new], dtype=torch.int64, device=model.device)
        model(tokens, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
