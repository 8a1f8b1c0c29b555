"""The store against a dull dense reference that keeps everything."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chain import quiet

from pqkv_cli.calibration.collect import CollectSettings, collect
from pqkv_cli.calibration.observer import draw_queries, draw_sample
from pqkv_cli.calibration.store import CalibrationStore, LayerSamples
from pqkv_cli.hf.taps import AttentionStep, tap
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.rotary import rotary_angles
from pqkv_kernels.format.rotary import unrotate


class KeepAll:
    def __init__(self) -> None:
        self.steps: dict[int, list[AttentionStep]] = {}

    def attention(self, layer_index: int, step: AttentionStep) -> None:
        self.steps.setdefault(layer_index, []).append(step)


def dense_reference(model: Any, windows: torch.Tensor, settings: CollectSettings, layer: int) -> LayerSamples:
    """Window by window, everything in memory, loops instead of matrix tricks."""
    shape = geometry(model.config).layers[layer]
    seen = KeepAll()
    with torch.no_grad(), tap(model, seen):
        for window in windows[: settings.num_windows]:
            model(window[None])
    steps = seen.steps[layer]
    group = shape.group_size
    keys, values, masses = [], [], []
    moment = torch.zeros(shape.num_kv_heads, shape.head_dim, shape.head_dim, dtype=torch.float64)
    num_pairs = 0 if shape.rotary is None else shape.rotary.num_pairs
    met = torch.zeros(shape.num_kv_heads, num_pairs, 2, 2, dtype=torch.float64)
    for number, step in enumerate(steps):
        positions = torch.arange(settings.seq_len)[None]
        key = step.keys[0].float()
        if shape.rotary is not None:
            cos, sin = rotary_angles(model, layer)(positions)
            key = unrotate(key, cos, sin, shape.rotary)
        keys.append(key)
        values.append(step.values[0])
        mass = torch.zeros(shape.num_kv_heads, settings.seq_len)
        for head in range(shape.num_heads):
            q = step.queries[0, head].double()
            moment[head // group] += q.T @ q
            for t in draw_queries(number, settings.seq_len, settings.queries_per_window, settings.seed).tolist():
                logits = q[t] @ step.keys[0, head // group, : t + 1].double().T * step.arguments.scaling
                mass[head // group, : t + 1] += (logits.softmax(-1) ** 2 / group).float()
                if shape.rotary is not None:
                    # The query as each key before rotary embedding meets it: turned back by the key's angle.
                    turned = unrotate(q[t].expand(t + 1, -1), cos[0, : t + 1].double(), sin[0, : t + 1].double(), shape.rotary)
                    for pair, channels in enumerate(shape.rotary.pairs()):
                        r = turned[:, channels]
                        met[head // group, pair] += r.T @ (r * logits.softmax(-1)[:, None])
        masses.append(mass)
    sample = draw_sample(settings.num_windows, settings.seq_len, settings.reservoir_size, settings.seed)
    weight = model.model.layers[layer].self_attn.o_proj.weight.detach().double()
    gram = torch.zeros_like(moment)
    for head in range(shape.num_heads):
        w = weight[:, head * shape.head_dim : (head + 1) * shape.head_dim]
        gram[head // group] += w.T @ w
    return LayerSamples(
        torch.cat(keys, 1)[:, sample].half(),
        torch.cat(values, 1)[:, sample].half(),
        (sample % settings.seq_len).int(),
        torch.cat(masses, 1)[:, sample],
        moment / (settings.num_windows * settings.seq_len),
        met / (settings.num_windows * settings.queries_per_window),
        gram,
    )


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen3", {}),
    ("glm4", {}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
]


@pytest.mark.parametrize(("model_type", "changes"), CASES, ids=["llama", "qwen3", "glm4", "dynamic"])
def test_the_store_equals_a_dull_reference(
    random_model: Any,
    windows: torch.Tensor,
    settings: CollectSettings,
    tmp_path: Path,
    model_type: str,
    changes: dict[str, Any],
) -> None:
    model = random_model(model_type, **changes)
    collect(model, windows, tmp_path, settings, quiet)
    store = CalibrationStore(tmp_path)
    assert torch.equal(store.held_out(), windows[-1:])
    for i in range(2):
        found, expected = store.layer(i), dense_reference(model, windows, settings, i)
        assert found.keys.dtype == found.values.dtype == torch.float16
        assert found.positions.dtype == torch.int32
        assert found.query_moment.dtype == found.output_gram.dtype == torch.float64
        assert torch.equal(found.positions, expected.positions)
        # One unit in the last place of fp16: a batch of windows rounds otherwise than a single one.
        torch.testing.assert_close(found.keys, expected.keys, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found.values, expected.values, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found.attention_mass, expected.attention_mass, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.query_moment, expected.query_moment, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.pair_moment, expected.pair_moment, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(found.output_gram, expected.output_gram)


def test_softcap_and_sinks_change_the_mass(
    random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path
) -> None:
    masses = []
    for name, cap in (("a", 50.0), ("b", 0.01)):
        types = ["full_attention"] * 2
        model = random_model("gemma2", "eager", layer_types=types, attn_logit_softcapping=cap)
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight *= 40
        collect(model, windows, tmp_path / name, settings, quiet)
        masses.append(CalibrationStore(tmp_path / name).layer(0).attention_mass)
    # A tiny cap makes attention uniform: the first token then gets 1 / (t + 1)^2 from every query t.
    queries = torch.stack([draw_queries(w, 24, 5, 0) for w in range(7)])
    sample = draw_sample(7, 24, 60, 0)
    expected = torch.stack([((queries[s // 24] >= s % 24) / (queries[s // 24] + 1.0) ** 2).sum() for s in sample])
    torch.testing.assert_close(masses[1], expected.expand(2, -1), atol=1e-3, rtol=3e-2)
    assert not torch.allclose(masses[0], masses[1], rtol=0.1)


@pytest.mark.parametrize("model_type", ["phi3", "gpt2", "gpt_neox", "opt"])
def test_other_output_projections(
    random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path, model_type: str
) -> None:
    changes = {"head_dim": None, "num_key_value_heads": 4} if model_type != "phi3" else {}
    model = random_model(model_type, **changes)
    collect(model, windows, tmp_path, settings, quiet)
    gram = CalibrationStore(tmp_path).layer(0).output_gram
    weight = next(
        p
        for n, p in model.named_parameters()
        if n.endswith(("o_proj.weight", "c_proj.weight", "dense.weight", "out_proj.weight"))
    )
    matrix = weight.detach().double()
    total = matrix.T @ matrix if model_type != "gpt2" else matrix @ matrix.T
    blocks = torch.stack([total[h * 16 : h * 16 + 16, h * 16 : h * 16 + 16] for h in range(4)])
    torch.testing.assert_close(gram.sum(0), blocks.sum(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_seen_as_single_precision_ones_nearly(
    random_model: Any, windows: torch.Tensor, settings: CollectSettings, tmp_path: Path, dtype: torch.dtype
) -> None:
    stores = []
    for name, model in (("wide", random_model()), ("half", random_model().to(dtype))):
        collect(model, windows, tmp_path / name, settings, quiet)
        stores.append(CalibrationStore(tmp_path / name).layer(1))
    wide, half = stores
    assert torch.equal(half.positions, wide.positions)
    for name in ("keys", "values", "attention_mass", "query_moment", "pair_moment", "output_gram"):
        found, expected = (getattr(samples, name) for samples in (half, wide))
        assert found.dtype == expected.dtype
        assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max()), name
