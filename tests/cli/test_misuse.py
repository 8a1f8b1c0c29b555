"""One table of everything that can go wrong at the command line: its exit code, a phrase of its message, no left-overs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import BertConfig, LlamaConfig


@dataclass
class Places:
    """Good and bad things to point the command at."""

    tiny: Path
    text: Path
    exported: Path
    root: Path
    made: dict[str, Path] = field(default_factory=dict)

    def __getitem__(self, name: str) -> str:
        return str(getattr(self, name, None) or self.made[name])

    def make(self) -> None:
        for name in ("empty", "bare", "encoder", "narrow", "foreign"):
            self.made[name] = self.root / name
            self.made[name].mkdir()
        (self.made["bare"] / "config.json").write_text(json.dumps(LlamaConfig().to_dict()))
        shutil.copytree(self.tiny, self.made["encoder"], dirs_exist_ok=True)
        BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2).save_pretrained(self.made["encoder"])
        (self.made["foreign"] / "letter.txt").write_text("not a run")
        self._texts()
        self._runs()

    def _texts(self) -> None:
        for name, content in (("latin", b"caf\xe9 au lait"), ("short", b"too short"), ("blank", b" \n")):
            self.made[name] = self.root / f"{name}.txt"
            self.made[name].write_bytes(content)

    def _runs(self) -> None:
        for name in ("run", "uncalibrated", "unfitted", "flipped"):
            self.made[name] = self.root / name
            shutil.copytree(self.exported, self.made[name])
        for name, stages in (("uncalibrated", ()), ("unfitted", ("calibrate",))):
            file = self.made[name] / "stages.json"
            records = json.loads(file.read_text())
            file.write_text(json.dumps({stage: records[stage] for stage in stages}))
        artifact = self.made["flipped"] / "artifact" / "pqkv.safetensors"
        data = bytearray(artifact.read_bytes())
        data[-5] ^= 1
        artifact.write_bytes(data)


@pytest.fixture
def places(tiny_model: Path, texts: tuple[Path, Path], exported: Path, tmp_path: Path) -> Places:
    made = Places(tiny_model, texts[0], exported, tmp_path)
    made.make()
    return made


TABLE = [
    ("evl", 2, "did you mean 'eval'"),
    ("calibrate --smaples 3", 2, "--samples"),
    ("calibrate {tiny} --samples many", 2, "--samples"),
    ("calibrate {tiny} --samples 1", 2, "calibration.samples: found 1, expected at least 2"),
    ("calibrate {tiny} --samples 0 --seq-len 0 --seed -1", 2, "seed: found -1"),
    ("calibrate {tiny} --dtype flaot32", 2, "did you mean 'float32'"),
    ("calibrate {tiny} --device gpu", 2, "device: found 'gpu'"),
    ("calibrate {tiny} --data {text} --samples 4 --seq-len 32 --device cuda:99", 2, "this machine has"),
    ("calibrate {tiny} --json {empty}", 2, "expected a file name"),
    ("calibrate {tiny} --run {exported}", 2, "expected one of them"),
    ("calibrate lama-3-8b", 2, "did you mean 'llama-3-8b'"),
    ("calibrate", 1, "start one with: pqkv calibrate MODEL"),
    ("calibrate ./nowhere", 1, "does not exist"),
    ("calibrate llama-3-8b --model ./nowhere", 1, "is not there"),
    ("run llama-3-8b --model {empty}", 1, "is empty"),
    ("calibrate {empty}", 1, "is empty"),
    ("calibrate {foreign}", 1, "expected a model (config.json)"),
    ("calibrate {bare} --data {text}", 1, "no weights"),
    ("calibrate {encoder} --data {text} --samples 4 --seq-len 32", 1, "encoder"),
    ("calibrate {tiny} --data {latin}", 1, "is not UTF-8"),
    ("calibrate {tiny} --data {short}", 1, "Give more text"),
    ("calibrate {tiny} --data {blank}", 1, "is empty"),
    ("calibrate {tiny} --data nowhere.txt", 1, "is not there"),
    ("calibrate {tiny} --data stdlib:calibratoin", 1, "did you mean"),
    ("calibrate {tiny} --data {text} -o {foreign}", 1, "exists and is no run"),
    ("calibrate {encoder} --data {text} -o {run}", 1, "is a run of the model"),
    ("calibrate {run}/artifact", 2, "is an artifact"),
    ("calibrate llama-3-8b", 1, "meta-llama/Meta-Llama-3-8B"),
    ("calibrate some-org/some-model", 1, "some-org/some-model"),
    ("fit-codebooks {run} --bits 6", 2, "codebooks.bits: found 6; expected one of 5, 4.5, 4, 3.5, 3, 2.5, 2"),
    ("fit-codebooks {uncalibrated}", 1, "run it with: pqkv calibrate"),
    ("fit-codebooks {tiny}", 1, "start it with: pqkv calibrate"),
    ("export {unfitted}", 1, "run it with: pqkv fit-codebooks"),
    ("export {run} --num-sinks -1", 2, "cache.num_sinks: found -1"),
    ("export ./nowhere --byte-tables", 2, "--byte-tables is gone: look-up tables of bytes were never timed"),
    ("export {run} --tune --byte-tables", 2, "Use --tune alone: pqkv export RUN --tune"),
    ("eval {run} --task perplexty", 2, "did you mean 'perplexity'"),
    ("eval {run} --task passkey --mode al", 2, "did you mean 'all'"),
    ("eval {unfitted}", 1, "run it with: pqkv export"),
    ("eval {flipped} --task perplexity", 1, "hash"),
    ("generate {run}", 1, "no run was named"),
    ("bench {run} --backend cuda", 2, "--backend is 'cuda'; expected one of auto, torch, native, triton"),
    ("bench {run} --context 0 --repeats 0", 2, "--context is 0; expected at least 1; --repeats is 0"),
    ("generate", 2, "there is no prompt"),
    ("generate {run} once upon", 2, "put the prompt in quotes"),
    ("generate {run} once --graph maybe", 2, "expected auto, on or off"),
    ("generate {run} once --save-prefix", 2, "--save-prefix needs a store"),
    ("prefix sav {run}", 2, "did you mean 'save'"),
    ("prefix list", 2, "no store is named"),
    ("prefix save {run} --store {root}/store", 2, "--text and 'save' belong together"),
    ("prefix list --text {text} --store {root}/store", 2, "--text and 'save' belong together"),
    ("prefix list --max-age 3d --store {root}/store", 2, "belong to 'save' and 'prune', not to 'list'"),
    ("prefix prune --max-age soon --store {root}/store", 2, "--max-age is 'soon'; expected a time with its unit"),
    ("prefix prune --max-size 5 --store {root}/store", 2, "--max-size is '5'; expected a size with its unit"),
    ("prefix show --store {root}/store", 2, "show needs the name of a prefix"),
    ("prefix verify abc --store {root}/store", 2, "found 'abc' after 'verify'"),
    ("prefix show abc --store {root}/store", 1, "there is no prefix 'abc'"),
    ("prefix save {run} --text nowhere.txt --store {root}/store", 1, "cannot be read: No such file"),
    ("prefix save {run} --text {latin} --store {root}/store", 1, "is not UTF-8 (byte 3)"),
    ("prefix save {run} --text {blank} --store {root}/store", 1, "is empty; expected a text to store"),
    ("prefix save {run} --text {text} --store {root}/store", 1, "the model has 1024 positions"),
    ("prefix save {flipped} --text {short} --store {root}/store", 1, "hash"),
    ("bench {run} --memory 1GB", 2, "expected --shape beside them"),
    ("bench --shape small --memory 1", 2, "--memory is '1'; expected a size with its unit"),
    ("generate {flipped} once", 1, "hash"),
    ("inspect {flipped}", 1, "hash"),
    ("inspect {foreign}/letter.txt", 1, "a file of another kind"),
    ("inspect {tiny} --gpu 24", 2, "expected a size with its unit"),
    ("inspect {run} --gpu 24GB", 2, "expected a model: name the model itself"),
    ("recipes lst", 2, "did you mean 'list'"),
    ("recipes demo", 2, "pqkv recipes show demo"),
    ("recipes show", 2, "show needs a name"),
    ("recipes show dmo", 2, "did you mean 'demo'"),
    ("run llama-3-8", 2, "did you mean 'llama-3-8b'"),
]


@pytest.mark.parametrize(("line", "code", "phrase"), TABLE, ids=[line for line, _, _ in TABLE])
def test_misuse(
    line: str, code: int, phrase: str, pqkv: Callable, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = listing(tmp_path)
    answer = pqkv(*(word.format_map(places) for word in line.split()))
    assert phrase in answer.err
    assert answer.code == code, answer.err
    assert answer.out == ""
    assert answer.err.startswith("error: ") or "\nerror: " in answer.err
    assert "Traceback" not in answer.err
    assert listing(tmp_path) == before


def test_no_words_show_the_help(pqkv: Callable) -> None:
    answer = pqkv()
    assert answer.code == 2
    assert "calibrate" in answer.out


def test_head_dim_that_no_code_covers(pqkv: Callable, tmp_path: Path, texts: tuple[Path, Path], tiny_model: Path) -> None:
    from transformers import LlamaForCausalLM

    model = tmp_path / "narrow"
    shutil.copytree(tiny_model, model)
    config = LlamaConfig.from_pretrained(tiny_model)
    config.head_dim = 12
    LlamaForCausalLM(config).save_pretrained(model)
    assert pqkv("calibrate", model, "--data", texts[0], "--samples", 8, "--seq-len", 64, "-o", "run").code == 0
    answer = pqkv("fit-codebooks", "run", "--bits", 1)
    assert answer.code == 2
    assert "head_dim 12 is not divisible by the 8 channels" in answer.err
    assert "bits: 4" in Path("run/recipe.yaml").read_text()
    assert not Path("run/codebooks").exists()


def test_debug_shows_the_traceback(pqkv: Callable) -> None:
    assert "Traceback" in pqkv("recipes", "show", "dmo", "--debug").err


def test_empty_stdin_is_no_prompt(pqkv: Callable, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    answer = pqkv("generate", exported, "-")
    assert (answer.code, "stdin is empty" in answer.err) == (2, True)


def test_several_runs_must_be_chosen_from(pqkv: Callable, exported: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(exported, tmp_path / "runs" / name)
    answer = pqkv("inspect")
    assert (answer.code, "runs/one, runs/two" in answer.err) == (2, True)


def listing(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.name != ".lock"}
