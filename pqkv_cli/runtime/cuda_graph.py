"""Decode steps replayed from a CUDA graph: the host gives the device one command per token instead of one per operation.

Between two flushes a cache changes only in its windows. With windows at full capacity, and with their number of tokens in the
memory of the device, a step of one token per row is always the same work on the same addresses: it is captured once and
replayed. The step that flushes runs as ever, and the next one is captured anew. Knows no kernels.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

import torch

from pqkv_cli.cache.cache import QuantizedCache
from pqkv_cli.errors import CacheError
from pqkv_cli.hf.names import CACHE_KEYWORDS, cache_argument, given_cache
from pqkv_cli.hf.steps import step_positions
from pqkv_cli.runtime.attach import Attached
from pqkv_kernels.format.rotary import PageAngles

GraphRequest = Literal["auto", "on", "off"]
_INPUTS = ("input_ids", "position_ids", "attention_mask", *CACHE_KEYWORDS)


@dataclass(frozen=True, slots=True)
class GraphChoice:
    """Whether steps are captured, and the reason in words."""

    used: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Captured:
    """A captured step: `replay` does it again, and `output` then holds its answer."""

    replay: Callable[[], None]
    output: Any


Capture = Callable[[Callable[[], Any]], Captured]
"""Runs a step once or more, and returns it captured."""


def choose_graph(requested: GraphRequest, attached: Attached, cache: QuantizedCache) -> GraphChoice:
    """Return whether steps of `attached` over `cache` are captured.

    Raises
    ------
    CacheError
        If that was asked for and cannot be.
    """
    if requested == "off":
        return GraphChoice(False, "switched off")
    obstacle = _obstacle(attached, cache)
    if requested == "on" and obstacle is not None:
        raise CacheError(f"a captured step was asked for, but {obstacle}; choose auto or off")
    if obstacle is not None:
        return GraphChoice(False, obstacle)
    return GraphChoice(True, "the device is cuda and every layer attends to codes through Triton")


def _obstacle(attached: Attached, cache: QuantizedCache) -> str | None:
    device = torch.device(attached.model.device)
    if device.type != "cuda":
        return f"the device is {device.type} and graphs are CUDA's"
    if attached.backend.name != "triton":
        return f"the backend is {attached.backend.name} and only Triton's kernels can be captured"
    if len(set((getattr(attached.model, "hf_device_map", None) or {}).values())) > 1:
        return "the model lies on several devices"
    if len(cache.quantized_layers) < len(cache.layers):
        return "not every layer is quantized, and the others keep keys and values in tensors that move as they grow"
    homes = [store.home for layer in cache.quantized_layers for store in layer.pages.values()]
    if any(home is not None and home.type == "cpu" for home in homes):
        return "codes live in the memory of the CPU"
    return None


@contextmanager
def step_graph(attached: Attached, cache: QuantizedCache, capture: Capture | None = None) -> Iterator["StepGraph"]:
    """Let the model's steps over `cache` be captured by `capture` (a CUDA graph by default) and replayed."""
    model = attached.model
    graph = StepGraph(model.forward, cache, capture_cuda if capture is None else capture)
    before = vars(model).get("forward")  # put there by accelerate, for one

    @wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return graph.step(*args, **kwargs)

    model.forward = forward
    try:
        yield graph
    finally:
        del model.forward
        if before is not None:
            model.forward = before


class StaticStep:
    """The step of `cache`, for as long as `tensors` are what it holds. Knows buffers; captures nothing.

    Parameters
    ----------
    cache
        All its layers are quantized and hold codes, and it `has_room`.

    Attributes
    ----------
    coded_stop
        Where the rows stop to read codes in the step, [B] int64.
    newest
        Tokens in the windows before the step, [1] int64: the new one goes behind them.
    tensors
        What a captured step reads and writes, held so that no address is given to anything else.
    """

    def __init__(self, cache: QuantizedCache) -> None:
        self._cache, self._layers = cache, cache.quantized_layers
        for layer in self._layers:
            layer.pin_window()
        self.coded_stop = cache.slots.stops().clone()
        self.newest = torch.tensor([self._layers[0].num_window], device=self._layers[0].device)
        self.tensors, self._num_coded = cache.held_tensors(), self._count_coded()
        self._pages = [store.views() for layer in self._layers for store in layer.pages.values()]  # with their addresses

    def begin(self) -> None:
        """Write into the device's memory where the token of the step to come goes, and what the rows read as codes."""
        self.newest.fill_(self._layers[0].num_window)
        self.coded_stop.copy_(self._cache.slots.stops())

    def end(self) -> None:
        """Count the token that was put there."""
        for layer in self._layers:
            layer.count_token()

    def is_valid(self) -> bool:
        """Return whether the cache still holds the same tensors."""
        held = self._cache.held_tensors()
        same = len(held) == len(self.tensors) and all(a is b for a, b in zip(held, self.tensors, strict=True))
        return same and self._num_coded == self._count_coded()

    def capturing(self) -> AbstractContextManager[None]:
        """Let updates of the cache be this step's, which changes nothing but the windows and may run any number of times."""
        return self._cache.in_place(self.newest, self.coded_stop)

    def _count_coded(self) -> list[int]:
        return [layer.num_coded for layer in self._layers]


class StepGraph:
    """Steps over one cache; what cannot be replayed runs as it would without.

    Attributes
    ----------
    num_captured, num_replayed, num_plain
        Steps so far: captured, replayed, and run without.
    """

    def __init__(self, forward: Callable[..., Any], cache: QuantizedCache, capture: Capture) -> None:
        self._forward, self._cache, self._capture = forward, cache, capture
        self._captured: Captured | None = None
        self.num_captured = self.num_replayed = self.num_plain = 0

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model's forward returns; a captured step's answer is valid until the next step."""
        options = {name: value for name, value in kwargs.items() if name not in _INPUTS}
        if args or not self._is_known(kwargs, options) or not self._cache.has_room() or not self._has_page_angles():
            self.num_plain += 1
            return self._forward(*args, **kwargs)
        tokens = kwargs["input_ids"]
        num_past = self._cache.get_seq_length()
        positions = step_positions(kwargs.get("position_ids"), len(tokens), 1, num_past, tokens.device)
        self._cache.begin_step(positions, None)
        if self._captured is None or not self._is_current(tokens, options):
            self._renew(tokens, positions, options)
        assert self._captured is not None  # `_renew` has set it
        self._tokens.copy_(tokens)
        self._positions.copy_(positions)
        self._static.begin()
        self._captured.replay()
        self._static.end()
        self.num_replayed += 1
        return self._captured.output

    def _is_known(self, inputs: dict[str, Any], options: dict[str, Any]) -> bool:
        """Return whether this is a step of one token per row over the cache, without gradients or tensors of its own."""
        tokens = inputs.get("input_ids")
        if given_cache(inputs) is not self._cache or not isinstance(tokens, torch.Tensor) or tokens.shape[1] != 1:
            return False
        return not torch.is_grad_enabled() and not any(isinstance(value, torch.Tensor) for value in options.values())

    def _has_page_angles(self) -> bool:
        # Also computes the angles of new pages, which a captured step reads and so must hold.
        self._angles = [layer.page_angles() for layer in self._cache.quantized_layers]
        return all(angles is None or isinstance(angles, PageAngles) for angles in self._angles)

    def _is_current(self, tokens: torch.Tensor, options: dict[str, Any]) -> bool:
        return self._tokens.shape == tokens.shape and self._options == options and self._static.is_valid()

    def _renew(self, tokens: torch.Tensor, positions: torch.Tensor, options: dict[str, Any]) -> None:
        self._captured = None  # its memory first
        self._static = StaticStep(self._cache)
        self._tokens, self._positions, self._options = tokens.clone(), positions.contiguous().clone(), options
        self._held_angles = self._angles
        held = cache_argument(self._forward, self._cache)

        def run() -> Any:
            return self._forward(input_ids=self._tokens, position_ids=self._positions, **held, **options)

        with self._static.capturing():
            self._captured = self._capture(run)
        self.num_captured += 1


def capture_cuda(run: Callable[[], Any]) -> Captured:
    """Capture `run` in a CUDA graph, after one run that compiles and loads what it needs: neither may happen in a capture.

    Raises
    ------
    CacheError
        If the model does something that no graph holds, such as asking the device for a value.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CacheError(f"this model's step cannot be captured in a CUDA graph: {error}; generate with graph='off'") from error
    return Captured(graph.replay, output)
