"""Gradients of keys and values: right, unbiased, and the same under outliers that do not change the model."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import family_model
from tiny_chain import quiet, tokens

from pqkv_cli.baselines.outliers import injected, outlier_gauges
from pqkv_cli.calibration import collect as settings_module
from pqkv_cli.calibration.collect import CollectSettings, collect
from pqkv_cli.calibration.fisher import GradientObserver, fisher_directions, fisher_weight, frozen
from pqkv_cli.calibration.store import CalibrationStore, LayerSamples
from pqkv_cli.errors import DataError, UnsupportedModelError, UsageError
from pqkv_cli.hf.taps import tap
from pqkv_cli.models.geometry import geometry

PLAIN = ("keys", "values", "positions", "attention_mass", "query_moment", "pair_moment", "output_gram")
FISHER = ("key_fisher", "value_fisher", "key_weight", "value_weight")


def gradients_of(model: Any, ids: torch.Tensor, draws: Iterator[torch.Tensor] | list[torch.Tensor] | int) -> Any:
    every = torch.arange(ids.numel())
    observer = GradientObserver(geometry(model.config), every // ids.shape[1], every % ids.shape[1])
    with frozen(model), tap(model, observer, differentiable=True):
        logits = model(input_ids=ids, use_cache=False).logits
        chosen = fisher_directions(logits, range(len(ids)), draws, 0) if isinstance(draws, int) else draws
        return observer.finish(logits, chosen), logits.detach()


def shifted(module: torch.nn.Module, token: int, channel: int, size: float) -> Any:
    def add(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        moved = output.clone().flatten(2)  # [B, T, Hkv * D]
        moved[0, token, channel] += size
        return moved.view(output.shape)

    return module.register_forward_hook(add)


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


# glm4 turns interleaved pairs of some channels; layer 3 of gemma4 reads the keys and values of layer 1.
@pytest.mark.parametrize(
    ("name", "sides"),
    [("llama", ("k_proj", "v_proj")), ("glm4", ("k_proj", "v_proj")), ("gemma4_text", ("k_norm", "v_norm"))],
)
def test_gradients_are_those_of_finite_differences(name: str, sides: tuple[str, str]) -> None:
    model, ids, layer = family_model(name).double(), tokens(1, 12), 1
    direction = torch.randn(logits_of(model, ids).shape, generator=torch.Generator().manual_seed(0)).double()
    found, _ = gradients_of(model, ids, [direction])
    shape, attention = geometry(model.config).layers[layer], model.model.layers[layer].self_attn
    for field, module in zip(("key_gradients", "value_gradients"), sides, strict=True):
        gradient = getattr(found[layer], field)[:, :, 0].float()  # [Hkv, T, D]
        scale = float(gradient.abs().max())
        for token, channel in ((2, 3), (7, shape.head_dim + 1), (0, 5), (4, shape.head_dim - 1)):
            ends = []
            for size in (1e-2, -1e-2):
                handle = shifted(getattr(attention, module), token, channel, size)
                ends.append(float((logits_of(model, ids) * direction).sum()))
                handle.remove()
            head, within = divmod(channel, shape.head_dim)
            assert float(gradient[head, token, within]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=1e-2, abs=5e-3 * scale)


def test_directions_are_white_in_the_fisher_metric_of_every_token() -> None:
    logits = 2 * torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(1))
    drawn = torch.stack(list(fisher_directions(logits, [5], 4000, 0)))[:, 0].flatten(1).double()  # [draws, 3 * 4]
    found = drawn.mT @ drawn / len(drawn)
    p = logits[0].double().softmax(-1)
    expected = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    first, again, other = (next(fisher_directions(logits, [window], 1, 0)) for window in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_gradients_predict_the_divergence_of_a_small_error() -> None:
    model, ids = family_model("llama").double(), tokens(1, 16)
    model.lm_head.weight.data *= 20
    found, before = gradients_of(model, ids, 400)
    for field, module, token, channel in (("key_gradients", "k_proj", 3, 2), ("value_gradients", "v_proj", 6, 20)):
        gradient = getattr(found[1], field).float()[channel // 16, token, :, channel % 16]
        size = 1e-2 / float(gradient.square().mean().sqrt())
        handle = shifted(getattr(model.model.layers[1].self_attn, module), token, channel, size)
        after = logits_of(model, ids)
        handle.remove()
        log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
        divergence = float((log_p.exp() * (log_p - log_q)).sum())
        assert divergence == pytest.approx(float((gradient * size).square().mean() / 2), rel=0.3)


def with_fisher(settings: CollectSettings, draws: int = 1) -> CollectSettings:
    return dataclasses.replace(settings, fisher_draws=draws)


def collected(model: Any, windows: torch.Tensor, directory: Path, settings: CollectSettings) -> LayerSamples:
    collect(model, windows, directory, settings, quiet)
    return CalibrationStore(directory).layer(0)


def test_gradients_come_beside_what_there_was(
    random_model: Callable[..., Any], windows: torch.Tensor, settings: CollectSettings, tmp_path: Path
) -> None:
    model = random_model()
    asking = [p.requires_grad for p in model.parameters()]
    plain = collected(model, windows, tmp_path / "plain", settings)
    both = collected(model, windows, tmp_path / "both", with_fisher(settings, 2))
    assert [p.requires_grad for p in model.parameters()] == asking and all(p.grad is None for p in model.parameters())
    for name in PLAIN:
        torch.testing.assert_close(getattr(plain, name), getattr(both, name))
    assert all(getattr(plain, name) is None for name in FISHER)
    assert both.key_fisher is not None and both.key_weight is not None
    assert both.key_fisher.shape == both.query_moment.shape and both.key_fisher.dtype == torch.float64
    assert both.key_weight.shape == both.attention_mass.shape and both.key_weight.dtype == torch.float32
    assert bool((both.key_weight >= 0).all()) and 0.5 < float(both.key_weight.mean()) < 2
    # The keys of late tokens meet few queries.
    late = both.positions == int(both.positions.max())
    assert float(both.key_weight[:, late].mean()) < float(both.key_weight.mean())


def test_parts_do_not_change_gradients_and_a_killed_run_resumes(
    random_model: Callable[..., Any],
    windows: torch.Tensor,
    settings: CollectSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, settings = random_model(), with_fisher(settings)
    collect(model, windows, tmp_path / "one", settings, quiet)
    monkeypatch.setattr(settings_module, "PART_TOKENS", 1)

    def killer(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, windows, tmp_path / "many", settings, killer)
    collect(model, windows, tmp_path / "many", settings, quiet)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes()


def test_outliers_that_leave_the_model_as_it_is_leave_every_weight_as_it_is(
    random_model: Callable[..., Any], windows: torch.Tensor, settings: CollectSettings, tmp_path: Path
) -> None:
    model, settings = random_model(), with_fisher(settings)
    plain = collected(model, windows, tmp_path / "plain", settings)
    gauges = outlier_gauges(model, 16.0, seed=1)
    with injected(model, gauges):
        loud = collected(model, windows, tmp_path / "loud", settings)
    assert not torch.equal(plain.keys, loud.keys) and not torch.equal(plain.values, loud.values)
    assert plain.key_weight is not None and loud.key_weight is not None
    assert plain.value_weight is not None and loud.value_weight is not None
    assert torch.equal(plain.key_weight, loud.key_weight) and torch.equal(plain.value_weight, loud.value_weight)
    on_keys, on_values = gauges[0].query_map, gauges[0].output_map
    assert plain.key_fisher is not None and plain.value_fisher is not None
    assert torch.equal(loud.key_fisher, on_keys @ plain.key_fisher @ on_keys.mT)
    assert torch.equal(loud.value_fisher, on_values.mT @ plain.value_fisher @ on_values)


def test_half_precision_models_have_about_the_same_gradients(
    random_model: Callable[..., Any], windows: torch.Tensor, settings: CollectSettings, tmp_path: Path
) -> None:
    wide = collected(random_model(), windows, tmp_path / "wide", with_fisher(settings))
    for dtype in (torch.float16, torch.bfloat16):
        half = collected(random_model().to(dtype), windows, tmp_path / str(dtype), with_fisher(settings))
        for name in ("key_fisher", "value_fisher"):
            expected = getattr(wide, name)
            torch.testing.assert_close(getattr(half, name), expected, rtol=0.2, atol=0.05 * float(expected.abs().max()))


def spoiled(model: Any, layer: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let `change` pass over what goes into a layer's output projection."""
    model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(lambda module, args: (change(args[0]),))


class Spoil(torch.autograd.Function):
    """The identity, with a NaN in the gradient of one channel."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        spoiled = gradients[0].clone()
        spoiled[..., 33] = float("nan")  # query head 2, of the second key/value head
        return spoiled


def test_non_finite_gradients_name_layer_and_head(
    random_model: Callable[..., Any], windows: torch.Tensor, settings: CollectSettings, tmp_path: Path
) -> None:
    model = random_model(attention="eager")
    spoiled(model, 0, Spoil.apply)
    collect(model, windows, tmp_path / "plain", settings, quiet)
    with pytest.raises(DataError, match=r"gradients of the keys of layer 0, key/value head 1 are not finite.*without --fisher"):
        collect(model, windows, tmp_path / "fisher", with_fisher(settings), quiet)


def test_a_model_without_gradients_is_refused(
    random_model: Callable[..., Any], windows: torch.Tensor, settings: CollectSettings, tmp_path: Path
) -> None:
    model = random_model()
    spoiled(model, 1, torch.Tensor.detach)
    with pytest.raises(UnsupportedModelError, match=r"no gradient for the keys or values of layer 1.*without --fisher"):
        collect(model, windows, tmp_path, with_fisher(settings), quiet)


def test_a_head_that_nothing_depends_on_has_weights() -> None:
    assert torch.equal(fisher_weight(torch.zeros(1, 5, 1, 4), torch.zeros(1, 4, 4).double()), torch.zeros(1, 5))


def test_fewer_than_no_draws_are_refused(settings: CollectSettings) -> None:
    with pytest.raises(UsageError, match="fisher_draws is -1; expected at least 0"):
        with_fisher(settings, -1)
