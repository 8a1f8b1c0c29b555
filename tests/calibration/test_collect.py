"""The store against a dull dense reference that keeps everything."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pqkv_cli.calibration import settings as settings_module
from pqkv_cli.calibration.collect import collect
from pqkv_cli.calibration.sampling import draw_queries, draw_sample
from pqkv_cli.calibration.settings import CollectSettings
from pqkv_cli.calibration.store import CalibrationStore, LayerSamples
from pqkv_cli.calibration.text import token_windows
from pqkv_cli.errors import DataError, RunError, UnsupportedModelError
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.load import load_model
from pqkv_cli.models.resolve import resolve_model
from pqkv_cli.models.rotary import rotary_angles
from pqkv_cli.models.taps import AttentionStep, tap
from pqkv_kernels.rope import unrotate


class KeepAll:
    def __init__(self) -> None:
        self.steps: dict[int, list[AttentionStep]] = {}

    def attention(self, layer_index: int, step: AttentionStep) -> None:
        self.steps.setdefault(layer_index, []).append(step)


def quiet(done: int, total: int) -> None:
    pass


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
                logits = q[t] @ step.keys[0, head // group, : t + 1].double().T * step.scaling
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


def test_dense_layers_store_nothing(
    random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path
) -> None:
    model = random_model("gemma3_text", layer_types=["sliding_attention", "full_attention"])
    collect(model, windows, tmp_path, settings, quiet)
    store = CalibrationStore(tmp_path)
    assert store.layer(1).keys.shape == (2, 60, 16)
    with pytest.raises(RunError, match="stays dense \\(sliding window"):
        store.layer(0)
    with pytest.raises(RunError, match=r"layers 0\.\.1"):
        store.layer(2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["layer-001.safetensors", "manifest.json", "windows.safetensors"]


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


def stored_bytes(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [0, 2, 4, 6, 7])
def test_resuming_gives_the_same_bytes(
    random_model: Any,
    settings: CollectSettings,
    windows: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_at: int,
) -> None:
    monkeypatch.setattr(settings_module, "PART_TOKENS", 1)
    model = random_model()
    calls: list[tuple[int, int]] = []
    collect(model, windows, tmp_path / "whole", settings, lambda done, total: calls.append((done, total)))
    assert calls == [(0, 7), (2, 7), (4, 7), (6, 7), (7, 7)]

    def killer(done: int, total: int) -> None:
        if done == kill_at:
            raise Killed

    with pytest.raises(Killed):
        collect(model, windows, tmp_path / "resumed", settings, killer)
    with pytest.raises(RunError, match="half-finished"):
        CalibrationStore(tmp_path / "resumed")
    resumed: list[int] = []
    collect(model, windows, tmp_path / "resumed", settings, lambda done, total: resumed.append(done))
    assert resumed[0] == kill_at
    assert stored_bytes(tmp_path / "resumed") == stored_bytes(tmp_path / "whole")


def test_parts_do_not_change_the_result(
    random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model()
    collect(model, windows, tmp_path / "one", settings, quiet)
    monkeypatch.setattr(settings_module, "PART_TOKENS", 1)
    collect(model, windows, tmp_path / "many", settings, quiet)
    assert stored_bytes(tmp_path / "one") == stored_bytes(tmp_path / "many")


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(
    random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path, finished: bool
) -> None:
    model = random_model()

    def stop(done: int, total: int) -> None:
        if not finished:
            raise Killed

    try:
        collect(model, windows, tmp_path, settings, stop)
    except Killed:
        assert not finished
    before = stored_bytes(tmp_path)
    other = dataclasses.replace(settings, seed=1, reservoir_size=50)
    with pytest.raises(RunError, match=r"reservoir_size was 60, now 50; settings\.seed was 0, now 1.*delete this one"):
        collect(model, windows, tmp_path, other, quiet)
    with pytest.raises(RunError, match="windows_sha256"):
        collect(model, windows + 1, tmp_path, settings, quiet)
    with torch.no_grad():
        changed = random_model()
        changed.model.layers[0].self_attn.q_proj.weight += 1
    with pytest.raises(RunError, match=r"model\.weights_sha256"):
        collect(changed, windows, tmp_path, settings, quiet)
    assert stored_bytes(tmp_path) == before


def test_a_finished_calibration_is_left_alone(
    random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path
) -> None:
    model = random_model()
    collect(model, windows, tmp_path, settings, quiet)
    model.forward = model.model.forward = None  # not called again
    calls: list[int] = []
    collect(model, windows, tmp_path, settings, lambda done, total: calls.append(done))
    assert calls == [7]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("projection", "name"), [("k_proj", "keys"), ("v_proj", "values"), ("q_proj", "queries")])
def test_non_finite_activations_name_layer_and_head(
    random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path, bad: float, projection: str, name: str
) -> None:
    model = random_model(attention_bias=True)
    with torch.no_grad():
        row = 17 if projection != "q_proj" else 33  # the second kv head
        getattr(model.model.layers[0].self_attn, projection).bias[row] = bad
    with pytest.raises(DataError, match=rf"{name} of layer 0, key/value head 1 are not finite"):
        collect(model, windows, tmp_path, settings, quiet)


def test_fp16_overflow_names_layer_head_and_value(
    random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path
) -> None:
    model = random_model(attention_bias=True)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.bias[3] = 70000.0
    with pytest.raises(DataError, match=r"values of layer 1, key/value head 0 reach 70000.*fp16 storage overflowed"):
        collect(model, windows, tmp_path, settings, quiet)


def test_windows_must_fit(random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\[7, 24\]; expected \[8, 24\]"):
        collect(random_model(), windows[:7], tmp_path, settings, quiet)
    with pytest.raises(DataError, match=r"24 tokens; the model reads at most 16"):
        collect(random_model(max_position_embeddings=16), windows, tmp_path, settings, quiet)
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        collect(random_model("mistral", sliding_window=8), windows, tmp_path, settings, quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_temporary_file(
    random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pqkv_cli.files.os.replace", full)
        with pytest.raises(RunError, match=r"No space left on device.*run again"):
            collect(random_model(), windows, tmp_path, settings, quiet)
    assert not list(tmp_path.rglob("*.tmp"))
    collect(random_model(), windows, tmp_path, settings, quiet)
    assert CalibrationStore(tmp_path).layer(0).keys.shape == (2, 60, 16)


def test_damaged_files_are_named(random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Run pqkv calibrate"):
        CalibrationStore(tmp_path)
    collect(random_model(), windows, tmp_path, settings, quiet)
    path = tmp_path / "layer-001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"layer-001\.safetensors is damaged"):
        CalibrationStore(tmp_path).layer(1)
    (tmp_path / "manifest.json").write_text('{"schema": "pqkv.calibration/99"}')
    with pytest.raises(RunError, match=r"calibration/99.*expected 'pqkv\.calibration/1'"):
        CalibrationStore(tmp_path)


def test_no_observer_tensor_grows_with_the_text(
    random_model: Any, windows: torch.Tensor, settings: CollectSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held between batches is the sum per layer: part files never hold more than the reservoir."""
    monkeypatch.setattr(settings_module, "PART_TOKENS", 1)
    sizes: list[int] = []

    def watch(done: int, total: int) -> None:
        parts = list((tmp_path / "parts").glob("moments-*"))
        assert len(parts) <= 1
        sizes.append(sum(p.stat().st_size for p in (tmp_path / "parts").glob("samples-*")))

    long = windows.repeat(8, 1)
    collect(random_model(), long, tmp_path, dataclasses.replace(settings, num_samples=64), watch)
    per_token = 2 * 2 * (16 * 2 * 2 + 4)  # layers, heads, keys and values in fp16, mass
    assert sizes[-1] <= 60 * per_token + 28 * 2000


def test_model_is_left_in_its_mode(random_model: Any, settings: CollectSettings, windows: torch.Tensor, tmp_path: Path) -> None:
    model = random_model().train()
    collect(model, windows, tmp_path, settings, quiet)
    assert model.training


def test_a_real_model(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(resolve_model(str(stories)))
    windows = token_windows(tokenizer, "Once upon a time there was a little dog named Tim. " * 400, 8, 64, seed=0)
    settings = CollectSettings("", 8, 64, batch_size=4, reservoir_size=256)
    collect(model, windows, tmp_path, settings, quiet)
    samples = CalibrationStore(tmp_path).layer(4)
    assert samples.keys.shape == (4, 256, 8)
    assert bool((samples.attention_mass >= 0).all())
    assert bool((torch.linalg.eigvalsh(samples.query_moment) > -1e-9).all())
