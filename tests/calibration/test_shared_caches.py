"""Layers that read another layer's keys and values count as its queries."""

import torch
from family_models import family_model
from tiny_chain import tokens

from pqkv_cli.calibration.collect import output_gram
from pqkv_cli.calibration.observer import BatchObserver
from pqkv_cli.hf.modules import attention_modules
from pqkv_cli.hf.taps import AttentionStep, tap
from pqkv_cli.models.geometry import geometry
from pqkv_cli.specs import ModelGeometry


class Queries:
    def __init__(self) -> None:
        self.seen: dict[int, torch.Tensor] = {}

    def attention(self, layer_index: int, step: AttentionStep) -> None:
        self.seen[layer_index] = step.queries


@torch.no_grad()
def test_the_queries_of_all_readers_count() -> None:
    model = family_model("gemma4_text")
    shape = geometry(model.config)
    assert shape.kv_sources == (0, 1, 0, 1)
    ids, sampled = tokens(2, 30), torch.arange(10)
    chosen = torch.tensor([[3, 29], [7, 20]])
    observer, recorder = BatchObserver(shape, torch.zeros_like(sampled), sampled, chosen), Queries()
    alone = BatchObserver(
        ModelGeometry(shape.model_type, shape.layers, shape.max_positions), torch.zeros_like(sampled), sampled, chosen
    )
    with tap(model, observer), tap(model, recorder), tap(model, alone):
        model(ids, use_cache=False)
    found, one = observer.finish()[1], alone.finish()[1]
    grouped = [recorder.seen[i].double().reshape(2, 2, -1, 32) for i in (1, 3)]
    expected = sum((q.mT @ q).sum(0) for q in grouped)
    torch.testing.assert_close(found.query_moment, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(found.keys, one.keys) and torch.equal(found.values, one.values)
    assert (found.attention_mass >= one.attention_mass).all() and found.attention_mass.sum() > one.attention_mass.sum()
    assert (found.pair_moment.diagonal(dim1=-2, dim2=-1) >= one.pair_moment.diagonal(dim1=-2, dim2=-1)).all()


def test_the_output_weights_of_all_readers_count(tmp_path) -> None:
    from tiny_chain import fit_artifact

    from pqkv_cli.calibration.store import CalibrationStore

    model = family_model("gemma4_text")
    fit_artifact(model, tmp_path)
    layer, attention = geometry(model.config).layers[1], attention_modules(model)
    expected = output_gram(attention[1], layer) + output_gram(attention[3], layer)
    stored = CalibrationStore(tmp_path / "calibration").layer(1).output_gram
    torch.testing.assert_close(stored.double(), expected, rtol=1e-4, atol=1e-6)
