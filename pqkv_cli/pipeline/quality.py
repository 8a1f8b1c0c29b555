"""Measures again a part of what was recorded about an artifact's quality, on the same windows. Knows no terminal."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from pqkv_cli.artifact.store import Artifact
from pqkv_cli.calibration.text import load_text
from pqkv_cli.errors import PqkvError, RunError
from pqkv_cli.evaluation.perplexity import perplexity
from pqkv_cli.evaluation.samples import SCHEMA
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from pqkv_cli.pipeline.content import text_identity
from pqkv_cli.pipeline.start import Source

RECORD = "perplexity-all.jsonl"
# The same codes on the same windows: only rounding may differ, in another type or on another device. A wrong rotation, table
# or kernel multiplies the divergence.
TOLERANCE = 0.1
_SLACK_BITS = 1e-5
_SLACK_AGREEMENT = 0.01
_REMEDY = "measure again with: pqkv eval RUN --task perplexity --mode all"


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was measured when the artifact was evaluated: how, on which text, and each window's numbers."""

    settings: EvaluationSettings
    data: str
    dtype: str
    windows: Sequence[Mapping[str, Any]]

    def first(self, count: int) -> tuple[float, float]:
        """Return mean KL divergence, bits per token, and top-1 agreement over the first `count` windows."""
        chosen = self.windows[:count]
        return fmean(fmean(w["kl_bits"]) for w in chosen), fmean(fmean(w["agrees"]) for w in chosen)


@dataclass(frozen=True, slots=True)
class Recheck:
    """What came of measuring again."""

    is_met: bool
    detail: str


def load_recorded(source: Source, artifact: Artifact) -> Recorded:
    """Return what is recorded about just this artifact.

    Raises
    ------
    RunError
        If nothing is, it is damaged, or it is about another artifact.
    """
    path = source.results / "samples" / RECORD
    if not path.is_file():
        raise RunError(f"no windows are recorded in {path}; {_REMEDY}")
    try:
        head, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        key = head["key"]
        if head["schema"] != SCHEMA or key["artifact_sha256"] != artifact.sha256:
            raise RunError(f"{path} is about another artifact; {_REMEDY}")
        windows = [line for line in lines if "closed" not in line and "failed" not in line]
        recorded = Recorded(EvaluationSettings(**key["settings"]), key["data"], key["dtype"], windows)
        recorded.first(len(windows))
    except (OSError, ValueError, KeyError, TypeError, PqkvError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{path} cannot be used ({type(error).__name__}: {error}); {_REMEDY}") from error
    return recorded


def recheck(source: Source, recorded: Recorded, artifact: Artifact, model: Any, tokenizer: Any, num_windows: int) -> Recheck:
    """Measure the first `num_windows` windows again and compare with what is recorded of them.

    Raises
    ------
    RunError
        If the text of `source` is not the recorded one.
    DataError
        If the text cannot be read.
    """
    data = source.recipe.evaluation.data
    text = load_text(data)
    if text_identity(data) != recorded.data:
        raise RunError(f"the recorded windows are of another text than {data}; name that text with --data, or {_REMEDY}")
    count = min(num_windows, len(recorded.windows))
    settings = replace(recorded.settings, limit=count)
    subject = Subject(model, tokenizer, artifact, text)
    outcome = perplexity(subject, settings, lambda done, total: None)
    if outcome.failed:
        return Recheck(False, f"{len(outcome.failed)} of {count} windows have no result ({outcome.failed[0]}); {_REMEDY}")
    metrics = outcome.metrics
    kl_bits, agreement = metrics["kl_bits"]["quantized"], metrics["top1_agreement"]["quantized"]
    wanted_bits, wanted_agreement = recorded.first(count)
    is_met = kl_bits <= wanted_bits * (1 + TOLERANCE) + _SLACK_BITS and agreement >= wanted_agreement - _SLACK_AGREEMENT
    return Recheck(
        is_met,
        f"KL {kl_bits:.4g} bits per token (recorded {wanted_bits:.4g}), top-1 agreement {agreement:.4g} (recorded "
        f"{wanted_agreement:.4g}) on {count} windows of {settings.context} tokens; up to {TOLERANCE:.0%} more KL is rounding",
    )
