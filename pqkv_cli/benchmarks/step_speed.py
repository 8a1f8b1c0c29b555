"""Whole steps of a model: decode steps over a cache filled at random, and the reading of a prompt. Compares nothing."""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers import QuantizedCache as TransformersQuantizedCache

from pqkv_cli.cache.cache import QuantizedCache
from pqkv_cli.cache.drift import DriftWarning
from pqkv_cli.errors import CacheError
from pqkv_cli.evaluation.record import OURS
from pqkv_cli.hf.attention import attending, attention_of
from pqkv_cli.hf.cache_layers import tensor_bytes
from pqkv_cli.hf.names import cache_argument
from pqkv_cli.runtime.attach import Attached
from pqkv_cli.runtime.cuda_graph import Capture, capture_cuda, choose_graph, step_graph
from pqkv_kernels.bench import Quantiles, quantiles
from pqkv_kernels.dispatch import encode_pages
from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.rotary import Angles
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.prediction import left_over


def cache_bytes(cache: Any) -> int:
    """Return the bytes of a cache's tensors; quanto's packed tensors do not tell theirs."""
    return cache.num_bytes().total if isinstance(cache, QuantizedCache) else sum(map(tensor_bytes, cache.layers))


def filled(model: Any, cache: Any, context: int, batch: int = 1, chunk: int | None = None) -> Any:
    """Return `cache` with `context` random tokens in each of `batch` rows, put in `chunk` (by default all) at a time."""
    config = model.config.get_text_config()
    heads, dim = (
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    generator = torch.Generator(model.device).manual_seed(0)
    for start in range(0, context, chunk or context):
        stop = min(start + (chunk or context), context)
        if isinstance(cache, QuantizedCache):
            cache.begin_step(torch.arange(start, stop, device=model.device).expand(batch, -1), None)
        for index in range(config.num_hidden_layers):
            shape = (2, batch, heads, stop - start, dim)
            states = torch.randn(shape, generator=generator, device=model.device, dtype=torch.float32).to(model.dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DriftWarning)  # noise is unlike any text, and nobody reads what comes of it
                cache.update(states[0], states[1], index)
    return cache


def plain_step(model: Any, tokens: torch.Tensor, cache: Any, position: int) -> Any:
    """Decode `tokens` [B, 1], all at `position`, and return the model's answer."""
    where = torch.full_like(tokens, position)
    return model(input_ids=tokens, position_ids=where, **cache_argument(model, cache), use_cache=True)


def wall_ms(run: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds until `run` is done and the device has nothing left to do."""
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return (time.perf_counter() - started) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


STATIC, CAPTURED = "StaticCache", ", captured"

ROOM = 4  # tokens that warm up, where steps are timed and where one is captured

Step = Callable[[int], Any]
"""Decodes one token at a position."""


def captured_steps(
    attached: Attached,
    makers: Mapping[str, Callable[[], Any]],
    token: torch.Tensor,
    context: int,
    capture: Capture | None,
    stack: ExitStack,
) -> tuple[dict[str, Step], dict[str, str]]:
    """Return the captured steps over caches of `context` tokens by name, and why one is missing.

    Parameters
    ----------
    makers
        Make the empty caches `OURS` and `STATIC`; the static one has room for two tokens more than are decoded.
    capture
        None is a CUDA graph where steps can be captured in one.
    stack
        What ends the captures.
    """
    if capture is None:
        choice = choose_graph("auto", attached, makers[OURS]())
        if not choice.used:
            return {}, {name + CAPTURED: choice.reason for name in (OURS, STATIC)}
        capture = capture_cuda
    steps: dict[str, Step] = {}
    missing: dict[str, str] = {}
    for name, begin in ((OURS, _ours), (STATIC, _static)):
        try:
            steps[name + CAPTURED] = begin(attached, makers[name](), token, context, capture, stack)
        except CacheError as error:
            missing[name + CAPTURED] = str(error)
    return steps, missing


def _ours(attached: Attached, cache: Any, token: torch.Tensor, context: int, capture: Capture, stack: ExitStack) -> Step:
    filled(attached.model, cache, context)
    stack.enter_context(step_graph(attached, cache, capture))
    step = partial(plain_step, attached.model, token, cache)
    step(context)  # what cannot be captured shows before anything is timed
    return lambda position: step(position + 1)


def _static(attached: Attached, cache: Any, token: torch.Tensor, context: int, capture: Capture, _: ExitStack) -> Step:
    return captured_static(attached.model, filled(attached.model, cache, context), token, context, capture)


def captured_static(model: Any, cache: Any, tokens: torch.Tensor, context: int, capture: Capture) -> Step:
    """Return the captured step of `tokens` [B, 1] over a static `cache` of `context` tokens, with torch's own attention.

    Raises
    ------
    CacheError
        If it cannot be captured.
    """
    where = torch.full_like(tokens, context)
    with attending(model, "sdpa"):
        captured = capture(partial(model, input_ids=tokens, position_ids=where, **cache_argument(model, cache), use_cache=True))

    def step(position: int) -> Any:
        where.fill_(position + 1)
        captured.replay()
        return captured.output

    return step


_QUANTO = "optimum.quanto"
_RUN = 5  # steps of one cache, one after the other, that are counted


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """Times of one decode step at `context` cached tokens and bytes held, by cache, and why a cache is missing."""

    context: int
    ms_per_token: Mapping[str, Quantiles]
    missing: Mapping[str, str]
    cache_bytes: Mapping[str, int] = field(default_factory=dict)

    def ratio(self, other: str) -> float | None:
        """Return how many times faster ours is than `other`; captured steps are compared with captured ones."""
        found = self.ms_per_token.get(other)
        ours = self.ms_per_token.get(OURS + CAPTURED if other.endswith(CAPTURED) else OURS)
        return None if found is None or ours is None else found.p50 / ours.p50

    def row(self) -> dict[str, Any]:
        """Return the measurement and what follows from it, as JSON can hold it."""
        return asdict(self) | {"ratios": {name: self.ratio(name) for name in self.ms_per_token if name != OURS}}


@torch.no_grad()
def time_tokens(attached: Attached, context: int, repeats: int, capture: Capture | None = None) -> TokenTimes:
    """Decode at least `repeats` tokens at `context` cached tokens, a run of steps at a time in turns over the caches.

    Steps of a generation follow each other, too. The first of a run is not counted: it finds what another cache has left in the
    processor's. The first run warms up.

    On a GPU our cache and the static one are timed a second time with their steps replayed from a CUDA graph (`capture`).
    """
    model = attached.model
    counted = min(repeats, _RUN)
    runs = 1 + math.ceil(repeats / counted)
    makers, missing = _makers(attached, context + runs * (counted + 1) + ROOM)
    caches = {name: filled(model, make(), context) for name, make in makers.items()}
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    steps: dict[str, Step] = {name: partial(plain_step, model, token, cache) for name, cache in caches.items()}
    ours = attention_of(model)
    with ExitStack() as stack:
        replayed, obstacles = captured_steps(attached, makers, token, context, capture, stack)
        steps, missing = steps | replayed, missing | obstacles
        stack.callback(model.set_attn_implementation, ours)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for run in range(runs):
            for name, step in steps.items():
                model.set_attn_implementation(ours if name.startswith(OURS) else "sdpa")
                first = context + run * (counted + 1)
                found = [wall_ms(partial(step, first + i), token.device) for i in range(counted + 1)]
                times[name] += found[1:] if run else []
    held = {name: cache_bytes(cache) for name, cache in caches.items() if name != "QuantizedCache"}
    return TokenTimes(context, {name: quantiles(found) for name, found in times.items()}, missing, held)


def _makers(attached: Attached, capacity: int) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    config = attached.model.config
    makers: dict[str, Callable[[], Any]] = {
        OURS: attached.new_cache,
        "DynamicCache": lambda: DynamicCache(config=config),
        STATIC: lambda: StaticCache(config=config, max_cache_len=capacity),
    }
    missing = {}
    if find_spec(_QUANTO.split(".")[0]) and find_spec(_QUANTO):
        makers["QuantizedCache"] = lambda: TransformersQuantizedCache("quanto", config, nbits=4)
    else:
        missing["QuantizedCache"] = "optimum-quanto is not installed"
    return makers, missing


MOST_REPEATS = 5  # a prompt takes seconds where a step takes milliseconds


@dataclass(frozen=True, slots=True)
class PrefillTimes:
    """Reading a prompt of `tokens`.

    `prefill_ms` is over transformers' DynamicCache, `codes_prefill_ms` over codes; `encode_ms` is encoding alone, of the whole
    pages of all layers.
    """

    tokens: int
    prefill_ms: Quantiles
    codes_prefill_ms: Quantiles
    encode_ms: Quantiles

    def row(self) -> dict[str, Any]:
        """Return the measurement and what follows from it, as JSON can hold it."""
        plain = self.prefill_ms.p50
        return asdict(self) | {"share": self.encode_ms.p50 / plain, "overhead": self.codes_prefill_ms.p50 / plain - 1}


@torch.no_grad()
def time_prefill(attached: Attached, keys: CodecTables, values: CodecTables, num_tokens: int, repeats: int) -> PrefillTimes:
    """Read `num_tokens` in turns over both caches; `keys` and `values` are the tables of all layers."""
    model, ours = attached.model, attention_of(attached.model)
    device, num_layers = torch.device(model.device), model.config.get_text_config().num_hidden_layers
    ids = torch.ones(1, num_tokens, dtype=torch.int64, device=device)
    states, angles = _states(keys, num_tokens, device, model.dtype)
    dense: list[float] = []
    coded: list[float] = []
    alone: list[float] = []

    def read(attention: str, cache: Any) -> float:
        model.set_attn_implementation(attention)
        return wall_ms(lambda: model(ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1), device)

    def encode() -> None:
        pages = encode_pages(attached.backend.name, states, keys, angles)
        encode_pages(attached.backend.name, left_over(states, pages, keys, values), values)

    try:
        for repeat in range(min(repeats, MOST_REPEATS) + 1):  # the first warms up
            found = read("sdpa", DynamicCache(config=model.config)), read(ours, attached.new_cache()), wall_ms(encode, device)
            for times, ms in zip((dense, coded, alone), found, strict=True):
                times += [ms] if repeat else []
    finally:
        model.set_attn_implementation(ours)
    return PrefillTimes(num_tokens, quantiles(dense), quantiles(coded), quantiles([ms * num_layers for ms in alone]))


def _states(keys: CodecTables, num_tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, Angles | None]:
    """Return random states of one layer's whole pages, and their angles."""
    whole = num_tokens // PAGE_TOKENS * PAGE_TOKENS
    states = torch.randn(1, keys.num_heads, whole, keys.layout.head_dim, device=device).to(dtype)
    if keys.rotary is None:
        return states, None
    rates = torch.logspace(0, -4, keys.rotary.num_pairs, device=device)
    angle = torch.arange(whole, device=device)[None, :, None] * rates
    return states, (angle.cos(), angle.sin())
