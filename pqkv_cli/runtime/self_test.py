"""Does this machine compute what the codes mean? Sends a probe through a real cache layer before any text goes through it.

The probe's codes are drawn by a fixed generator, so its decoded vectors are known: they must come back from encoding, and
attention over the codes must give what plain softmax in double precision gives over what the codes stand for.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from pqkv_cli.cache.cache import QuantizedCache
from pqkv_cli.cache.layer import QuantizedLayer
from pqkv_cli.cache.positions import SlotPositions
from pqkv_cli.errors import CacheError, PqkvError, UnsupportedModelError
from pqkv_cli.hf.names import cache_argument
from pqkv_cli.models.rotary import AngleSource
from pqkv_cli.runtime.attention import pqkv_attention
from pqkv_cli.specs import SIDES, CacheSpec, Side
from pqkv_kernels.dispatch import BackendName
from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.check_codes import wrong_vectors
from pqkv_kernels.reference.encode import decode, from_code_space, to_code_space
from pqkv_kernels.reference.prediction import decode_values, left_over

TOLERANCE = 0.02  # of the answer's root mean square; kernels may round to half precision
_FIRST_POSITION = 1000
_MOST_FORMATS = 3
_NUM_HEADS = 2
_ADVICE = (
    "This device or backend computes wrong answers: use another one, and report this with the output of "
    "`python -m torch.utils.collect_env`"
)


def self_test(
    tables: Sequence[Mapping[Side, CodecTables] | None],
    angle_sources: Sequence[AngleSource | None],
    device: torch.device,
    backend: BackendName = "torch",
) -> None:
    """Test one layer of every code format of a model, at most three, on `device`; takes some milliseconds.

    Raises
    ------
    CacheError
        If encoding or attention over codes gives other answers than the reference.
    """
    tested: set[object] = set()
    for layer_tables, source in zip(tables, angle_sources, strict=True):
        if layer_tables is None:
            continue
        formats = tuple((t.layout, t.rotary, t.prediction is None) for t in (layer_tables[side] for side in SIDES))
        if formats not in tested and len(tested) < _MOST_FORMATS:
            tested.add(formats)
            _test_layer({side: _some_heads(layer_tables[side]) for side in SIDES}, source, device, backend)


@torch.no_grad()
def _test_layer(
    tables: Mapping[Side, CodecTables], source: AngleSource | None, device: torch.device, backend: BackendName
) -> None:
    generator = torch.Generator().manual_seed(0)
    heads, dim = tables["keys"].num_heads, tables["keys"].layout.head_dim
    positions = torch.arange(_FIRST_POSITION, _FIRST_POSITION + PAGE_TOKENS + 1)[None]
    coded = positions[:, :PAGE_TOKENS]
    drawn: dict[Side, torch.Tensor] = {side: _random_pages(tables[side], generator) for side in SIDES}
    known = {side: _reference(side, drawn, tables, source, coded) for side in SIDES}
    scale = {side: _size(known[side]) or 1.0 for side in SIDES}  # tables of a layer that is always zero stand for zero alone
    newest = {side: torch.randn(1, heads, 1, dim, generator=generator) * scale[side] for side in SIDES}
    query = torch.randn(1, heads, 1, dim, generator=generator) / scale["keys"]

    layer = QuantizedLayer(dict(tables), CacheSpec(0, 0), SlotPositions(), source, backend)
    for states, start in ((known, 0), (newest, PAGE_TOKENS)):
        layer.slots.begin(start, positions[:, start : start + states["keys"].shape[2]].to(device), None)
        keys, values = layer.update(states["keys"].to(device), states["values"].to(device))
    found, _ = pqkv_attention(torch.nn.Module(), query.to(device), keys, values, None, scaling=dim**-0.5)
    pages: dict[Side, torch.Tensor] = {side: torch.cat(layer.pages[side].views(), dim=1).cpu() for side in SIDES}
    encoded = {side: _reference(side, pages, tables, source, coded) for side in SIDES}
    for side in SIDES:
        _compare_codes(side, known[side], pages, tables, source, coded)
    _compare("attention over codes", found[0, 0].cpu(), _answer(query, encoded, newest), TOLERANCE)


def _some_heads(tables: CodecTables) -> CodecTables:
    """Return the tables of the first heads: enough to find wrong answers, and a quarter of the time of most models."""
    tensors = {f.name: _sliced(getattr(tables, f.name)) for f in fields(tables) if f.init}
    return replace(tables, **tensors)


def _sliced(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value[:_NUM_HEADS]
    return tuple(map(_sliced, value)) if isinstance(value, tuple) else value


def _random_pages(tables: CodecTables, generator: torch.Generator) -> torch.Tensor:
    shape = (1, 1, tables.num_heads, tables.layout.page_bytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _reference(
    side: Side,
    pages: Mapping[Side, torch.Tensor],
    tables: Mapping[Side, CodecTables],
    source: AngleSource | None,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Return the keys or values [1, Hkv, 64, D] fp32 that `pages` stand for, decoded on the CPU."""
    keys, values = (tables[each].to(torch.device("cpu")) for each in SIDES)
    if side == "values":
        return from_code_space(decode_values(pages["keys"], pages["values"], keys, values), values)
    return decode(pages["keys"], keys, source(positions) if source is not None and keys.rotary is not None else None)


def _answer(query: torch.Tensor, known: dict[Side, torch.Tensor], newest: dict[Side, torch.Tensor]) -> torch.Tensor:
    keys, values = (torch.cat((known[side], newest[side]), dim=2)[0].double() for side in SIDES)
    weights = torch.softmax(query[0].double() @ keys.mT * query.shape[-1] ** -0.5, dim=-1)
    return (weights @ values)[:, 0]


def _size(x: torch.Tensor) -> float:
    """Return the root mean square of `x`."""
    return float(x.double().square().mean().sqrt())


def _compare_codes(
    side: Side,
    states: torch.Tensor,
    pages: Mapping[Side, torch.Tensor],
    tables: Mapping[Side, CodecTables],
    source: AngleSource | None,
    positions: torch.Tensor,
) -> None:
    """Compare the codes of `states` [1, Hkv, 64, D] in `pages` with those that the reference stores."""
    keys, values = (tables[each].to(torch.device("cpu")) for each in SIDES)
    if side == "values":
        states = left_over(states, pages["keys"], keys, values)
    own = keys if side == "keys" else values
    angles = source(positions) if source is not None and own.rotary is not None else None
    wrong = wrong_vectors(to_code_space(states, own, angles), pages[side], own)
    if bool(wrong.any()):
        raise CacheError(
            f"self-test: encoding of {side} gives {int(wrong.sum())} of {wrong.numel()} vectors other codes than the "
            f"reference, and rounding does not explain them; expected none. {_ADVICE}"
        )


def _compare(what: str, found: torch.Tensor, expected: torch.Tensor, at_most: float) -> None:
    error = _size(found.double() - expected.double()) / (_size(expected) or 1.0)
    if not error <= at_most:  # a comparison with NaN is false
        raise CacheError(
            f"self-test: {what} differs from the reference by {error:.3g} of its size; expected at most {at_most}. {_ADVICE}"
        )


@torch.no_grad()
def check_step(model: Any, cache: QuantizedCache) -> None:
    """Let `model` read one token into `cache`, which is new; one on the device ``meta``, which computes nothing, is left out.

    Raises
    ------
    UnsupportedModelError
        If the step fails, or the cache was not told of it, or a quantized layer was not given its keys and values.
    """
    device = torch.device(model.device)
    if device.type == "meta":
        return
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    name = type(model).__name__
    try:
        with _evaluating(model):
            model(input_ids=token, **cache_argument(model, cache), use_cache=True)
    except (PqkvError, torch.OutOfMemoryError) as error:
        if cache.slots.num_slots or not isinstance(error, PqkvError):
            raise
        raise UnsupportedModelError(_unannounced(name)) from error
    except Exception as error:  # a model's own code can raise anything, and all of it means that the model cannot be used
        raise UnsupportedModelError(
            f"{name} cannot take a step of one token over a quantized cache: {type(error).__name__}: {error}; "
            "expected a causal language model that reads input_ids alone. Use this model without pqkv"
        ) from error
    if not cache.slots.num_slots:
        raise UnsupportedModelError(_unannounced(name))
    if empty := [i for i, layer in enumerate(cache.layers) if layer in cache.quantized_layers and layer.get_seq_length() != 1]:
        raise UnsupportedModelError(
            f"{name} gave no keys and values to its cache in layers {', '.join(map(str, empty))}; expected those of every "
            "quantized layer at every step. Use this model without pqkv"
        )


def _unannounced(name: str) -> str:
    return (
        f"{name} passes by its own base model when it is called, so that no step's positions are known; expected a model "
        "whose forward calls model.base_model, as most of transformers do. Use this model without pqkv"
    )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Let no part of `model` draw random numbers while the context lasts: what the caller draws next stays the same."""
    training: list[nn.Module] = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
