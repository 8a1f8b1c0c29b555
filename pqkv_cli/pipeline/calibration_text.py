"""The texts of a calibration: those of its recipe, and what the model wrote itself, kept in its run."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqkv_cli.calibration.openings import SELF, openings_sha256
from pqkv_cli.calibration.ranks import current_ranks
from pqkv_cli.calibration.text import load_text
from pqkv_cli.calibration.writing import write_batch
from pqkv_cli.errors import DataError, RunError
from pqkv_cli.files import write_text
from pqkv_cli.models.prefix import plain_ids
from pqkv_cli.models.resolve import resolve_model
from pqkv_cli.pipeline.fingerprints import model_fingerprint
from pqkv_cli.pipeline.rundir import Run
from pqkv_cli.recipe import Recipe
from pqkv_cli.reporter import Advance, Reporter

_SPARE = 1.05  # between texts stand a few tokens, and joined they may have fewer than alone
_MOST_IDLE = 2  # batches in a row of which nothing is kept


@dataclass(frozen=True, slots=True)
class OwnText:
    """The text of one run, in a file of JSON lines: one text a line, with its kind, its tokens, its batch and its key."""

    file: Path
    key: str
    num_tokens: int

    def read(self) -> str:
        """Return the text, all of it that the run reads.

        Raises
        ------
        DataError
            If the model has not written it, or not all of it.
        """
        chosen, total = [], 0
        for row in self._rows():
            chosen.append(str(row["text"]))
            total += int(row["tokens"])
            if total >= self.num_tokens:
                return "\n\n".join(chosen)
        raise DataError(
            f"{self.file} holds {total} of {self.num_tokens} tokens that the model writes for its calibration; expected all of "
            "them: pqkv calibrate writes them"
        )

    def write(self, model: Any, tokenizer: Any, seed: int, reporter: Reporter) -> None:
        """Let `model` write what is missing, batch by batch; each is on disk before the next one begins.

        Raises
        ------
        DataError
            If the model writes nothing but repetitions.
        """
        rows = self._rows()
        batch, idle = 1 + max((int(row["batch"]) for row in rows), default=-1), 0
        total = sum(int(row["tokens"]) for row in rows)
        with reporter.progress("the model writes") as advance:
            while total < self.num_tokens:

                def step(done: int, of_batch: int, before: int = total) -> None:
                    advance(min(before + done, self.num_tokens), self.num_tokens)

                new, left_out = self._batch(model, tokenizer, seed, batch, step)
                rows += new
                total, batch, idle = total + sum(row["tokens"] for row in new), batch + 1, 0 if new else idle + 1
                write_text(self.file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), RunError)
                if left_out:
                    reporter.note(f"{left_out} of {left_out + len(new)} texts are left out, because they repeat themselves")
                if idle == _MOST_IDLE:
                    raise DataError(
                        f"all texts of {idle} batches that the model wrote repeat themselves; expected prose: give text with "
                        "--data FILE or --data stdlib:broad"
                    )

    def _batch(self, model: Any, tokenizer: Any, seed: int, batch: int, advance: Advance) -> tuple[list[dict[str, Any]], int]:
        written, left_out = write_batch(model, tokenizer, seed, batch, advance)
        rows = [
            {
                "batch": batch,
                "kind": each.kind,
                "tokens": len(plain_ids(tokenizer, each.text)),
                "key": self.key,
                "text": each.text,
            }
            for each in written
        ]
        return [row for row in rows if row["tokens"]], left_out

    def _rows(self) -> list[dict[str, Any]]:
        """Return what is on disk under this key; what another model wrote, or a damaged file, counts as nothing."""
        try:
            rows = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
            own = [row for row in rows if row["key"] == self.key and row["tokens"] > 0 and isinstance(row["text"], str)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"{self.file} cannot be read ({error.strerror}); expected a text: fix the rights") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.file} is damaged ({type(error).__name__}: {error}); delete it, then calibrate") from error
        return own if len(own) == len(rows) else []


def own_text(run_texts: Path, recipe: Recipe) -> OwnText:
    """Return the text that the model of `recipe` writes for it, whether or not it is written, in the folder `run_texts`."""
    wanted = recipe.calibration
    windows = -(-wanted.samples // len(wanted.data))
    facts = (model_fingerprint(resolve_model(recipe.model).path_or_id), recipe.seed, recipe.dtype, openings_sha256())
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    # One window more, because the last one is seldom full.
    return OwnText(run_texts / "self.jsonl", key[:16], int(_SPARE * (windows + 1) * wanted.seq_len))


def named_texts(recipe: Recipe) -> Mapping[str, str]:
    """Return the texts by source, without the one that only the model can write.

    Raises
    ------
    DataError
        If one cannot be used.
    """
    return {source: load_text(source) for source in recipe.calibration.data if source != SELF}


def calibration_texts(recipe: Recipe, run: Run | None) -> list[str]:
    """Return the texts that `run` was calibrated on, in the order of the recipe.

    Raises
    ------
    DataError
        If one cannot be read; of a lone artifact, which has no run, the one that its model wrote.
    """
    named = named_texts(recipe)
    return [named[source] if source in named else _read(recipe, run) for source in recipe.calibration.data]


def written_texts(
    recipe: Recipe, run: Run, named: Mapping[str, str], model: Any, tokenizer: Any, reporter: Reporter
) -> list[str]:
    """Return the texts to calibrate on, in the order of the recipe; what `model` has not written yet it writes now.

    Of several processes the first one writes and tells the others.

    Raises
    ------
    DataError
        If the model writes nothing of use.
    """
    ranks = current_ranks()
    written = own_text(run.texts, recipe)
    if ranks.is_first:
        written.write(model, tokenizer, recipe.seed, reporter)
    own = ranks.broadcast(written.read() if ranks.is_first else None)
    return [named.get(source, own) for source in recipe.calibration.data]


def tell_written(recipe: Recipe, run: Run) -> None:
    """Tell the other processes what was written before, where a finished calibration asks nothing of them."""
    ranks = current_ranks()
    if SELF in recipe.calibration.data and ranks.size > 1:
        ranks.broadcast(_read(recipe, run))


def _read(recipe: Recipe, run: Run | None) -> str:
    if run is None:
        raise DataError(
            "what the model wrote for its calibration stays in the run, and this artifact lies alone; name the run instead"
        )
    return own_text(run.texts, recipe).read()
