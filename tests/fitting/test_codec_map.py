"""A codec map is one file and one line elsewhere: the diff in CONTRIBUTING, applied, makes one that works to the end."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import get_args

import fitting_support as support
import numpy as np
import pytest
import torch

from pqkv_cli.artifact.schema import CalibrationInfo, Header, LayerError, ModelInfo
from pqkv_cli.artifact.store import open_artifact, save_artifact
from pqkv_cli.errors import RunError
from pqkv_cli.fitting.fit import fit_layer
from pqkv_cli.fitting.record import load_record
from pqkv_cli.fitting.run import fit_codebooks, load_fitted
from pqkv_cli.fitting.settings import FitSettings
from pqkv_cli.quantizers.maps import MapStatistics, make_map
from pqkv_cli.specs import CODEC_MAPS, SIDES, CacheSpec, CodecMap, CodecSpec, CompressionPlan, LayerPlan, MapKind, ModelGeometry
from pqkv_kernels.format.layout import CodeGroup, CodeLayout
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.encode import round_trip

ROOT = Path(__file__).parents[2]
FAST = FitSettings(iterations=4)
# Two groups, behind a code of the whole vector: what remade maps and given prototypes have to agree on.
VALUES = CodecSpec(CodeLayout(((CodeGroup(1, 3, 8),), (CodeGroup(2, 3, 2), CodeGroup(1, 4, 4)))), "hadamard")


def diff() -> dict[str, str]:
    """Return what the diff in CONTRIBUTING adds, by file."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("- A codec map:") : text.index("- A page:")]
    added: dict[str, str] = {}
    for line in re.findall(r"^      \+(.*)$", section, re.MULTILINE):
        if line.startswith("++ "):
            added[line[3:]] = ""
        else:
            added[[*added][-1]] += line + "\n"
    return added


@pytest.fixture
def hadamard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apply the diff to the running program."""
    (file, code), (_, row) = diff().items()
    module = ModuleType(file.removesuffix(".py").replace("/", "."))
    exec(code, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, made in eval("{" + row + "}", {"CodecMap": CodecMap}).items():
        monkeypatch.setitem(CODEC_MAPS, name, made)


GEOMETRY = ModelGeometry("test", (support.LAYER,), 512)
PLAN = CompressionPlan({"k": support.KEYS, "v": VALUES}, (LayerPlan("k", "v"),), CacheSpec(4, 64))


def test_the_diff_is_one_new_file_and_one_line_elsewhere() -> None:
    (file, code), (table, row) = diff().items()
    assert not (ROOT / file).exists() and code
    assert (ROOT / table).exists() and row.count("\n") == 1


def slow_round_trip(vectors: np.ndarray, tables: CodecTables) -> np.ndarray:
    """Return what `vectors` [Hkv, N, D] become, by the definition of a code and with no function of ours."""
    assert tables.map is not None and tables.permutation is None
    (prototypes,), parts = ([table.double().numpy() for table in stage] for stage in tables.codebooks)
    decoded = np.empty_like(vectors)
    for head, matrix in enumerate(tables.map.double().numpy()):
        for n, x in enumerate(vectors[head]):
            y, candidates = matrix @ x, []
            for prototype in sorted(prototypes[head, 0], key=lambda p, y=y: ((y - p) ** 2).sum())[:4]:
                total, start = prototype.copy(), 0
                for subspaces in parts:
                    for centroids in subspaces[head]:
                        part = slice(start, start + centroids.shape[-1])
                        total[part] += centroids[((y[part] - prototype[part] - centroids) ** 2).sum(-1).argmin()]
                        start = part.stop
                candidates.append((((y - total) ** 2).sum(), total))
            decoded[head, n] = np.linalg.solve(matrix, min(candidates, key=lambda candidate: candidate[0])[1])
    return decoded


def save(directory: Path) -> LayerError:
    """Fit `PLAN`, write its artifact to `directory`, and return what the fit says of its errors."""
    record = fit_codebooks(support.Store(), GEOMETRY, PLAN, directory / "fit", FAST)
    assert load_record(directory / "fit") == record and record.plan.codecs["v"].map == "hadamard"
    error = LayerError(*(record.relative_error[0][side] for side in SIDES))
    header = Header(
        ModelInfo("test", "llama", "c" * 64, "d" * 64),
        GEOMETRY.layers,
        record.plan.as_stored(),
        (error,),
        CalibrationInfo("e" * 64, 32, 4, 512, 16384, 0),
        recipe_sha256="a" * 64,
        pqkv_version="0.1.0",
    )
    save_artifact(directory / "pqkv.safetensors", header, [layer.tables for layer in load_fitted(directory / "fit")])
    return error


def test_a_codec_with_it_is_fitted_saved_opened_and_read(hadamard: None, tmp_path: Path) -> None:
    error = save(tmp_path)
    opened = open_artifact(tmp_path)
    assert {name: codec.map for name, codec in opened.header.plan.codecs.items()} == {"k": "blocks", "v": "matrix"}
    layer = opened.tables[0]
    assert layer is not None and layer["values"].map is not None
    matrix = layer["values"].map.double()
    size = matrix.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(size.log2(), size.log2().round(), rtol=0, atol=1e-6)  # what brings codebooks into fp16
    torch.testing.assert_close((matrix / size).abs(), torch.full((2, 8, 8), 8**-0.5).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(matrix @ matrix.mT / size.square(), torch.eye(8).double().expand(2, 8, 8), rtol=0, atol=1e-6)
    assert not torch.equal(matrix[0], matrix[1])

    values = support.Store().layer(0).values
    expected = torch.from_numpy(slow_round_trip(values.double().numpy(), layer["values"]))
    decoded = round_trip(values[None], layer["values"], rotated=False)[0].double()
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-4)
    left_over = (values - expected).square().sum((1, 2)) / values.double().square().sum((1, 2))
    assert left_over.tolist() == pytest.approx(error.values, rel=1e-3)


def test_it_changes_nothing_but_the_side_that_has_it(hadamard: None) -> None:
    samples = support.samples(0)
    plain = fit_layer(samples, support.LAYER, {"keys": support.KEYS, "values": replace(VALUES, map="identity")}, settings=FAST)
    turned = fit_layer(samples, support.LAYER, {"keys": support.KEYS, "values": VALUES}, settings=FAST)
    assert torch.equal(plain.tables["keys"].codebooks[0][0], turned.tables["keys"].codebooks[0][0])
    assert plain.relative_error["keys"] == turned.relative_error["keys"]
    assert plain.relative_error["values"] != turned.relative_error["values"]


def test_recipes_schema_and_page_offer_it(tmp_path: Path) -> None:
    (file, code), (table, row) = diff().items()
    shutil.copytree(ROOT / "pqkv_cli", tmp_path / "pqkv_cli", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / file).write_text(code, encoding="utf-8")
    source = (tmp_path / table).read_text(encoding="utf-8")
    before, _, after = source.partition("CODEC_MAPS: dict[str, CodecMap] = {\n")
    rows, end, rest = after.partition("}\n")
    (tmp_path / table).write_text(before + "CODEC_MAPS: dict[str, CodecMap] = {\n" + rows + row + end + rest, encoding="utf-8")
    ask = (
        "import json\n"
        "from pqkv_cli.recipe_files import override, recipe_schema\n"
        "from pqkv_cli.recipe import Recipe\n"
        "from tools.generate_docs import recipe_page\n"
        "recipe = override(Recipe(name='a', model='b'), {'codebooks.value_map': 'hadamard'})\n"
        "print(json.dumps({'schema': recipe_schema()['properties']['codebooks']['properties'], 'page': recipe_page(Recipe),\n"
        "    'chosen': recipe.codebooks.value_map}))\n"
    )
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "kernels")))}
    answer = subprocess.run([sys.executable, "-c", ask], env=where, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    said = json.loads(answer.stdout)
    for side in ("key", "value"):
        words = said["schema"][f"{side}_map"]
        assert words["anyOf"][0]["enum"][-1] == "hadamard" and "hadamard (random signs and a rotation)" in words["description"]
        assert re.search(rf"`codebooks.{side}_map` .* `hadamard` \| .*hadamard \(random signs", said["page"])
    assert said["chosen"] == "hadamard"


@pytest.mark.parametrize("kind", get_args(MapKind))
def test_every_kind_is_a_map_of_its_own_name(kind: str) -> None:
    assert CODEC_MAPS[kind].kind == kind


def test_every_row_names_a_function() -> None:
    for name, row in CODEC_MAPS.items():
        module, _, function = row.maker.partition(":")
        assert callable(getattr(import_module(module), function)), name
        assert not row.is_remade or row.kind == "matrix", name


def test_a_map_of_another_kind_than_its_row_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODEC_MAPS, "odd", CodecMap("matrix", "pqkv_cli.quantizers.maps:scale", "wrong"))
    gram = torch.eye(8).double().expand(2, 8, 8)
    statistics = MapStatistics(torch.zeros(2, 5, 8), None, gram, torch.zeros(2, 0, 2, 2).double(), None, 0)
    with pytest.raises(TypeError, match=r"maps:scale made a map of shape \(2, 8\); expected \(2, 8, 8\), of the kind 'matrix'"):
        make_map("odd", statistics)


def test_a_fit_with_a_map_that_is_not_known_is_refused(tmp_path: Path) -> None:
    fit_codebooks(support.Store(), *support.plan(), tmp_path, FAST)
    path = tmp_path / "fit.json"
    path.write_text(path.read_text().replace('"map": "matrix"', '"map": "matrxi"'))
    with pytest.raises(RunError, match=r"fit.json is damaged .*codec v has the unknown map 'matrxi'.*matrix"):
        load_record(tmp_path)
