"""Decode steps replayed from a CUDA graph, over our cache and over a static one: speed without the host. Times nothing."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from pqkv_cli.errors import CacheError
from pqkv_cli.evaluation.decode_step import filled, plain_step
from pqkv_cli.hf.attention import attending
from pqkv_cli.hf.names import cache_argument
from pqkv_cli.runtime.attach import Attached
from pqkv_cli.runtime.step_graph import Capture, capture_cuda, choose_graph, step_graph

OURS, STATIC, CAPTURED = "pqkv", "StaticCache", ", captured"

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


def _static(attached: Attached, cache: Any, token: torch.Tensor, context: int, capture: Capture, stack: ExitStack) -> Step:
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
