"""Gates at the command line: exit codes, and a last line that a program can read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def line(exported: Path, texts: tuple[Path, Path], tmp_path: Path) -> list[object]:
    import shutil

    run = shutil.copytree(exported, tmp_path / "RUN")
    return ["eval", run, "--task", "perplexity", "--data", texts[1], "--mode", "all", "--limit", 2]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--max-kld", "9"], 0),
        (["--max-kld", "0"], 3),
        (["--min-recovery", "50%", "--max-ppl-increase", "100%"], 0),
        (["--gate", "perplexity.top1_agreement>1"], 3),
        (["--gate", "perplexity[all].bits_per_channel.total<=4"], 0),
    ],
)
def test_a_gate_decides_the_exit_code(words: list[str], code: int, pqkv: Callable, line: list[object], tmp_path: Path) -> None:
    answer = pqkv(*line, *words)
    assert answer.code == code, answer.err
    last = json.loads(answer.out.splitlines()[-1])
    assert last["gate"]["passed"] == (code == 0)
    assert ("quality gates not met" in answer.err) == (code == 3)
    kept = json.loads((tmp_path / "RUN" / "results" / "perplexity-all.json").read_text())
    assert kept["gate"] == last["results"][0]["gate"]
    assert len(kept["gate"]["checked"]) == len(words) // 2


def test_json_alone_on_stdout_carries_the_gate(pqkv: Callable, line: list[object]) -> None:
    answer = pqkv(*line, "--max-kld", 0, "--json", "-")
    assert (answer.code, answer.json["gate"]["passed"]) == (3, False)


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["--gate", "kl<0.1"], "the gate 'kl<0.1' is not understood"),
        (["--min-recovery", "98"], "expected a share such as 0.99 or 99%"),
        (["--max-kld", "0.1", "--gate", "perplexity.kl_bits>0.2"], "cannot hold together"),
        (
            ["--gate", "perplexity.kl_bit<=0.9"],
            "perplexity measures kl_bits, top1_agreement, top5_agreement, perplexity, recovery",
        ),
        (
            ["--task", "kld", "--gate", "*.kld<=0.9", "--gate", "kld.recovery>=0.9"],
            "could meet the gate *.kld<=0.9, kld.recovery",
        ),
        (["--gate", "passkey.accuracy>=0.9"], "nothing that is evaluated could meet the gate passkey.accuracy>=0.9"),
    ],
)
def test_gates_that_make_no_sense_are_misuse(words: list[str], phrase: str, pqkv: Callable, line: list[object]) -> None:
    answer = pqkv(*line, *words)
    assert (answer.code, answer.out) == (2, "")
    assert phrase in answer.err


def test_gates_of_a_recipe(pqkv: Callable, tiny_model: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"name: mine\nmodel: {tiny_model}\ncalibration: {{data: {texts[0]}, samples: 20, seq_len: 64}}\n"
        "codebooks: {iterations: 2}\n"
        f"evaluation: {{tasks: [perplexity], modes: [all], data: {texts[1]}, limit: 2, gates: ['perplexity.kl_bits<=0']}}\n"
        "generation: {prompt: once upon, max_new_tokens: 4}\n"
    )
    first = pqkv("run", recipe)
    assert first.code == 3, first.err
    assert json.loads(first.out.splitlines()[-1])["gate"]["passed"] is False
    # A threshold is no reason to measure again.
    recipe.write_text(recipe.read_text().replace("<=0'", "<=9'"))
    again = pqkv("run", recipe)
    assert (again.code, again.err.count("already done")) == (0, 4)
    other = pqkv("eval", "runs/mine", "--task", "passkey", "--mode", "all", "--context", 128, "--limit", 1)
    assert (other.code, "not judged, because evaluated are passkey in mode all" in other.err) == (0, True)


@pytest.mark.parametrize(("context", "code"), [(60, 3), (250, 0)])
def test_texts_in_the_exact_window_meet_no_gate(
    context: int, code: int, pqkv: Callable, exported: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    import shutil

    run = shutil.copytree(exported, tmp_path / "RUN")
    words = ["eval", run, "--task", "perplexity", "--data", texts[1], "--mode", "cache", "--limit", 2, "--context", context]
    answer = pqkv(*words, "--max-kld", 99, "--json", "-")
    assert answer.code == code, answer.err
    assert answer.json["gate"]["passed"] == (code == 0)
    assert (answer.json["cache_bytes"]["num_read_as_codes"] > 0) == (code == 0)
    assert ("no token was read as a code" in answer.err) == (code == 3)
