"""Generates text over a quantized cache: settings that count, tokens, the text they add. Prints nothing."""

import copy
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, get_args

import torch

from pqkv_cli.cache.cache import CacheBytes, QuantizedCache
from pqkv_cli.errors import DataError, UsageError
from pqkv_cli.hf.names import cache_argument
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.prefix import whole_ids
from pqkv_cli.runtime.attach import Attached
from pqkv_cli.runtime.cuda_graph import GraphChoice, GraphRequest, choose_graph, step_graph

SPECIAL_TOKENS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"})
# What its makers found good for the model's texts. Steps stay steps: one row, one token, one forward pass.
TEXT_SETTINGS = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "min_p",
        "no_repeat_ngram_size",
        "renormalize_logits",
        "repetition_penalty",
        "sequence_bias",
        "suppress_tokens",
        "top_h",
        "top_k",
        "top_p",
        "typical_p",
    }
)


@contextmanager
def own_settings(model: Any, kept: frozenset[str] = SPECIAL_TOKENS) -> Iterator[None]:
    """Let only the settings `kept` of the checkpoint's own count in ``model.generate`` inside the block."""
    before = model.generation_config
    settings = copy.deepcopy(before)
    for name in set(vars(settings)) - kept - {"transformers_version"}:
        setattr(settings, name, None)
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


_UNFINISHED = "\ufffd"  # what decoders write for bytes that are no whole character
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token for one byte, of which decoders join a run: all of it is text, or nothing is
_ANCHOR = 64  # tokens before a piece that are decoded with it


def added_text(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """Return the text that the tokens `new` add behind the tokens `prompt`; special tokens have none.

    A character that the prompt begins and the new tokens complete belongs to their text. Where the text of the prompt reads
    otherwise once more follows (spaces before punctuation, for one, which some tokenizers take away), it is what comes behind
    the last character that stays.
    """
    return _behind(_text(tokenizer, prompt), _text(tokenizer, [*prompt, *new]))


class TextPieces:
    """Takes the tokens that ``generate`` hands over, the prompt's first, and gives on the text that is certain.

    All pieces together are the `added_text` of all tokens. The last word is held back until another one begins, because some
    tokenizers still change the space before it; in scripts without spaces, characters are given as they come.

    Parameters
    ----------
    tokenizer
        What decodes.
    on_text
        Receives the pieces.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._prompt: list[int] | None = None
        self._new: list[int] = []
        self._given = ""  # all that was handed over
        self._anchor = 0  # tokens of prompt and new text before it are not decoded for a piece
        self._settled, self._before = 0, 0  # new tokens, and characters given, when the anchor was set

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt [1, T] or [T], then the new tokens [1] one by one."""
        tokens = value.reshape(-1).tolist()
        if self._prompt is None:
            self._prompt = tokens
            self._anchor = self._anchor_before(len(tokens))
            return
        self._new += tokens
        if _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(self._new[-1]))):
            return
        text = self._text_since_anchor()
        certain = text[: _num_certain(text)]
        given = self._given[self._before :]
        if certain.startswith(given) and len(certain) > len(given):
            self._give(certain[len(given) :])
        if certain == text and len(self._new) - self._settled > 4 * _ANCHOR:
            self._settled, self._before = len(self._new), len(self._given)
            self._anchor = self._anchor_before(len(self._prompt) + len(self._new))

    def end(self) -> None:
        """Give what was held back."""
        whole = added_text(self._tokenizer, self._prompt or [], self._new)
        self._give(_behind(self._given, whole))

    def _give(self, piece: str) -> None:
        self._given += piece
        if piece:
            self._on_text(piece)

    def _anchor_before(self, end: int) -> int:
        """Return where to begin to decode what follows the first `end` tokens: some text must stand before it."""
        first = max(end - _ANCHOR, 0)
        known = [*(self._prompt or ()), *self._new][first:end]
        return first if _text(self._tokenizer, known) else 0

    def _text_since_anchor(self) -> str:
        tokens = [*(self._prompt or ()), *self._new]
        known = len(self._prompt or ()) + self._settled
        return added_text(self._tokenizer, tokens[self._anchor : known], tokens[known:])


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text


def _behind(before: str, whole: str) -> str:
    """Return `whole` without `before`, or what they begin with alike."""
    if whole.startswith(before):
        return whole[len(before) :]
    return whole[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))) :]


def _num_certain(text: str) -> int:
    """Return how many characters of `text` no further token can change."""
    whole = text.rstrip(_UNFINISHED)
    if whole == text and text and unicodedata.category(text[-1]) == "Lo":  # letters of scripts without capitals
        return len(text)
    return max(whole.rfind(" "), whole.rfind("\n") + 1, 0)


@dataclass(frozen=True, slots=True)
class GenerateSettings:
    """How to generate; `temperature` 0 is greedy, `graph` says whether decode steps are captured (`choose_graph`).

    Raises
    ------
    UsageError
        If a field is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    graph: GraphRequest = "auto"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}; expected a finite number >= 0 (0 is greedy)")
        if self.graph not in get_args(GraphRequest):
            raise UsageError(f"graph is {self.graph!r}; expected one of {', '.join(get_args(GraphRequest))}")


@dataclass(frozen=True, slots=True)
class Generation:
    """A continuation, with the bytes of the cache that carried it and of an uncompressed one of the same tokens.

    `graph` says whether its steps were replayed from a CUDA graph, and why; `num_restored_tokens` how many tokens of the prompt
    the cache held before.
    """

    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    cache_bytes: CacheBytes
    baseline_bytes: int
    graph: GraphChoice
    num_restored_tokens: int = 0


def generate(
    attached: Attached,
    tokenizer: Any,
    prompt: str,
    settings: GenerateSettings,
    on_text: Callable[[str], None] | None = None,
    cache: QuantizedCache | None = None,
) -> Generation:
    """Continue `prompt`; `on_text` receives the new text piece by piece as it comes.

    A `cache` may be given that has read the first tokens of the prompt, not all of them; a new one is made by default.

    The text is what the new tokens add to that of the prompt, its first space included. Of the checkpoint's own generation
    settings those count that shape the text (`TEXT_SETTINGS`), and its special tokens.

    Raises
    ------
    DataError
        If the prompt has no tokens or leaves no room in the model's positions.
    CacheError
        If a captured step was asked for and cannot be.
    """
    model = attached.model
    ids = torch.tensor([whole_ids(tokenizer, prompt)], dtype=torch.int64, device=model.device)
    check_room(model, ids.shape[1], settings.max_new_tokens)
    cache = attached.new_cache() if cache is None else cache
    num_restored = cache.get_seq_length()
    choice = choose_graph(settings.graph, attached, cache)
    torch.manual_seed(settings.seed)
    sampling = {"do_sample": True, "temperature": settings.temperature} if settings.temperature else {"do_sample": False}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    captured = step_graph(attached, cache) if choice.used else nullcontext()
    with own_settings(model, SPECIAL_TOKENS | TEXT_SETTINGS), captured:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **cache_argument(model, cache),
            use_cache=True,
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=padding,
            streamer=None if on_text is None else TextPieces(tokenizer, on_text),
            **sampling,
        )
    new = output[0, ids.shape[1] :].tolist()
    return Generation(
        text=added_text(tokenizer, ids[0].tolist(), new),
        num_prompt_tokens=ids.shape[1],
        num_new_tokens=len(new),
        cache_bytes=cache.num_bytes(),
        baseline_bytes=_baseline_bytes(cache, model.dtype.itemsize),
        graph=choice,
        num_restored_tokens=num_restored,
    )


def check_room(model: Any, num_tokens: int, num_new: int) -> None:
    """Refuse a text of `num_tokens` after which `model` has no position for `num_new` more.

    Raises
    ------
    DataError
        If it has none, or the text has no tokens.
    """
    max_positions = geometry(model.config).max_positions or sys.maxsize
    if num_tokens == 0:
        raise DataError("the prompt has no tokens; give at least one word")
    if max_positions - num_tokens < num_new:
        room = max_positions - num_tokens
        way = f"shorten the prompt or ask for at most {room}"
        if room <= 0:
            way = f"that leaves room for at most 0, so shorten the prompt to {max(1, max_positions - num_new)} tokens"
            way += "" if max_positions > num_new else f" and ask for at most {max_positions - 1}"
        raise DataError(
            f"the prompt has {num_tokens} tokens and {num_new} more are asked for; the model has "
            f"{max_positions} positions: {way}"
        )


def _baseline_bytes(cache: Any, element_bytes: int) -> int:
    quantized = sum(
        sum(window.shape[0] * window.shape[1] * window.shape[3] for window in layer.window.values()) * layer.get_seq_length()
        for layer in cache.quantized_layers
    )
    return int(quantized * element_bytes + cache.num_bytes().dense)
