"""Is any family of the installed transformers silently another model under attention over codes? One line per family.

    OMP_NUM_THREADS=1 PYTHONPATH=tests:tests/cache python tests/studies/family_sweep.py [model_type ...]

A tiny random model of every causal language model that transformers can build from a config is calibrated, fitted and attached,
and generates for a padded and an unpadded row. A dense cache of what the codes stand for must give the same tokens under the
model's own attention. ``same`` and ``refused`` (with the reason) are good; ``DIFFERENT`` and ``broken`` are not, and make the
exit code 1; ``not built`` says that no tiny config was found.
"""

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from family_models import _MIXED, _MOE, _SIZES, FAMILIES, family_model
from oracle import generate, oracle_of
from tiny_chain import fit_artifact, tokens
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pqkv_cli.errors import PqkvError
from pqkv_cli.runtime import attach, load

NUM_TOKENS, PADDING = 190, 70
MOST_PARAMETERS = 20_000_000
# What is tried until a small model comes of it: sizes alone, with experts, with two kinds of layers, inside a composite.
SHAPES: tuple[dict[str, Any], ...] = (
    dict(num_hidden_layers=2),
    dict(num_hidden_layers=2, **_MOE),
    dict(_MIXED, **_MOE),
    dict(num_hidden_layers=2, head_dim=None, hidden_size=64),
)


@torch.no_grad()
def tiny_model(model_type: str) -> Any:
    """Return a small random model, None where no config of ours makes one."""
    if model_type in FAMILIES:
        return family_model(model_type)
    ids = tokens(1, NUM_TOKENS)
    for shape in SHAPES:
        for sizes in ({**_SIZES, **shape}, {"text_config": {**_SIZES, **shape}}):
            FAMILIES[model_type] = sizes
            try:
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
                if sum(p.numel() for p in model.parameters()) < MOST_PARAMETERS:
                    model = family_model(model_type)
                    model(input_ids=ids)  # not every model takes every size that its config takes
                    return model
            except Exception:  # noqa: S112  any config class may refuse in any way; the next shape is tried
                continue
    return None


@torch.no_grad()
def verdict(model: Any) -> str:
    """Return whether the model over codes gives the tokens of the oracle."""
    try:
        artifact = load(fit_artifact(model, Path(tempfile.mkdtemp())))
        with attach(model, artifact) as attached:
            ids = tokens(2, NUM_TOKENS, seed=7)
            mask = (torch.arange(NUM_TOKENS) >= torch.tensor([[PADDING], [0]])).long()
            held = attached.new_cache()
            found = generate(attached, held, ids, attention_mask=mask)
            expected = generate(attached, oracle_of(attached), ids, attention_mask=mask)
            how = f"{held.num_materialized} times decoded" if held.num_materialized else "over codes"
            return f"same ({how})" if torch.equal(found, expected) else "DIFFERENT"
    except PqkvError as error:
        return f"refused: {error}"
    except Exception as error:  # what a user would see as a traceback
        return f"broken: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def main(names: list[str]) -> int:
    """Print a line per family and return the exit code."""
    warnings.simplefilter("ignore")
    bad = 0
    for name in names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        model = tiny_model(name)
        line = "not built" if model is None else verdict(model)
        bad += line.startswith(("DIFFERENT", "broken"))
        print(f"{name:28} {line[:220]}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
