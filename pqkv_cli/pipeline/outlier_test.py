"""The outlier test of an artifact and its rivals: measured without outliers, then with. Knows runs and files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pqkv_cli.calibration.text import token_windows
from pqkv_cli.evaluation.peers import Contestant, compare, own_contestant
from pqkv_cli.evaluation.peers_outliers import GaugedSource, largest_difference, own_with_outliers
from pqkv_cli.evaluation.peers_record import MODE, TASK, peer_records
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.files import write_text
from pqkv_cli.models.gauge import OUTLIER_SHARE
from pqkv_cli.models.geometry import geometry
from pqkv_cli.models.outliers import check_scale, injected, outlier_gauges
from pqkv_cli.pipeline.evaluation_settings import task_settings
from pqkv_cli.pipeline.peers import fitted_rivals, open_comparison
from pqkv_cli.pipeline.reporter import Reporter
from pqkv_cli.pipeline.rundir import PEERS_FOLDER
from pqkv_cli.pipeline.start import Source
from pqkv_cli.quantizers.rivals.protocol import Rival
from pqkv_cli.quantizers.rivals.registry import METHODS, parse_rivals

Record = dict[str, Any]
FILE = "outliers.json"
# Shown where no rivals are named, at the rate nearest to the artifact's.
USUAL_RIVALS = ("million", "rtn", "kivi", "kvquant", "turboquant", "rotatekv")


@dataclass(frozen=True, slots=True)
class OutlierTest:
    """What came of it: records of the same contestants `without` and `with_outliers`, in the same order.

    `largest_difference` is between the uncompressed logits without and with outliers; 0 says they are equal bit for bit.
    """

    scale: float
    share: float
    largest_difference: float
    without: list[Record]
    with_outliers: list[Record]
    file: Path


def outlier_test(source: Source, wanted: str | None, scale: float, reporter: Reporter, *, force: bool = False) -> OutlierTest:
    """Measure the artifact of `source` and rivals on its model as it is and with outliers of `scale` put into it.

    Raises
    ------
    UsageError
        If `scale` is no power of two, a rival is unknown, or `source` is no run.
    UnsupportedModelError
        If outliers cannot be put into the model without changing it.
    DataError
        If the text cannot be used, or outliers do not fit half precision.
    """
    check_scale(scale)
    named = parse_rivals(wanted) if wanted is not None else None
    store, subject, artifacts = open_comparison(source, (), reporter, force=force)
    gauges = outlier_gauges(subject.model, scale, source.recipe.seed)
    settings = task_settings(TASK, MODE, source.recipe, subject)
    own = own_contestant(artifacts[0][1])
    rivals = named if named is not None else _usual(own)

    def measure(contestants: Sequence[Contestant], label: str) -> list[Record]:
        with reporter.progress(label) as advance:
            num_tokens = compare(subject, settings, contestants, advance)
        return peer_records(subject, settings, contestants, num_tokens)

    plain = [own, *fitted_rivals(rivals, store, subject, source.recipe.seed, reporter)]
    without = measure(plain, "without outliers")
    ids, logits = _first_logits(subject, settings)
    with injected(subject.model, gauges):
        difference = largest_difference(subject.model, ids, logits)
        gauged = GaugedSource(store, gauges, geometry(subject.model.config).layers)
        loud = [own_with_outliers(own, gauges), *fitted_rivals(rivals, gauged, subject, source.recipe.seed, reporter)]
        records = measure(loud, f"with outliers of {scale:g}")
    test = OutlierTest(scale, OUTLIER_SHARE, difference, without, records, source.results / PEERS_FOLDER / FILE)
    write_text(test.file, json.dumps(document(test), indent=1) + "\n")
    return test


def document(test: OutlierTest) -> dict[str, Any]:
    """Return the test as plain data."""
    return {
        "schema": "pqkv.outliers/1",
        "scale": test.scale,
        "share": test.share,
        "largest_logit_difference": test.largest_difference,
        "without": test.without,
        "with_outliers": test.with_outliers,
    }


def _usual(own: Contestant) -> list[Rival]:
    """Return the usual rivals at the native rate nearest to ours."""
    chosen = []
    for name in USUAL_RIVALS:
        rate = min(METHODS[name].rates, key=lambda bits: (abs(bits - own.native_bits), -bits))
        chosen.append(METHODS[name].make(rate))
    return chosen


@torch.no_grad()
def _first_logits(subject: Subject, settings: EvaluationSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first window [1, T] and the uncompressed model's logits of it."""
    windows = token_windows(subject.tokenizer, subject.text, 1, settings.context, settings.seed, at_most=True)
    ids = windows[:1].to(subject.model.device)
    return ids, subject.model(ids, use_cache=False).logits
