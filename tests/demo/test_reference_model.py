from importlib import resources

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from pqkv_cli.calibration.stdlib_text import stdlib_text
from pqkv_cli.evaluation.perplexity import perplexity
from pqkv_cli.evaluation.settings import EvaluationSettings, Subject
from tools.demo_model.card import measure
from tools.demo_model.tasks import RowMaker


def quiet(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="session")
def subject(reference) -> Subject:
    return Subject(reference.model, reference.tokenizer, reference.artifact, stdlib_text("evaluation"))


def kl_bits(subject: Subject, mode: str, limit: int, offset: int = 0) -> tuple[float, float]:
    settings = EvaluationSettings(mode, context=512, limit=limit, position_offset=offset, chunk_tokens=32)
    metrics = perplexity(subject, settings, quiet).metrics
    return metrics["kl_bits"]["quantized"], metrics["top1_agreement"]["quantized"]


def test_it_is_small_and_reaches_far(reference_model) -> None:
    model, tokenizer = reference_model
    files = resources.files("pqkv_cli") / "demo" / "model"
    assert sum((files / name).stat().st_size for name in ("model.safetensors",)) <= 8_000_000
    assert model.config.max_position_embeddings >= 4096 and model.config.num_key_value_heads < model.config.num_attention_heads
    assert 1900 <= len(tokenizer) <= 2200
    text = "any text: \u00e9\u4e2d\U0001f600\t\n  x"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("length", [512, 1024])
def test_it_recalls_at_full_precision(reference_model, length: int) -> None:
    model, _ = reference_model
    tokenizer = Tokenizer.from_file(str(resources.files("pqkv_cli") / "demo" / "model" / "tokenizer.json"))
    filler = np.array(tokenizer.encode(stdlib_text("evaluation")).ids)
    maker, rng = RowMaker(tokenizer, filler, 2.0, 0), np.random.default_rng(0)
    right, _ = measure(model, [maker.passkey(length, rng) for _ in range(20)])
    assert right >= 0.9


@pytest.mark.parametrize(("mode", "most_bits", "least_agreement"), [("all", 0.012, 0.95), ("cache", 0.003, 0.97)])
def test_four_bits_cost_little(subject: Subject, mode: str, most_bits: float, least_agreement: float) -> None:
    # Guards what docs/results.md reports against regressions, with room for another Python's text.
    divergence, agreement = kl_bits(subject, mode, limit=16)
    assert divergence <= most_bits and agreement >= least_agreement


def test_positions_do_not_matter(subject: Subject) -> None:
    at_zero, _ = kl_bits(subject, "all", limit=4)
    for offset in (4096, 32768, 131072):
        assert kl_bits(subject, "all", limit=4, offset=offset)[0] == pytest.approx(at_zero, rel=0.05)


def test_a_second_export_gives_the_same_bytes(reference, make_run, tmp_path) -> None:
    first = reference.artifact.path.read_bytes()
    run = tmp_path / "again"
    make_run(run)
    assert (run / "artifact" / "pqkv.safetensors").read_bytes() == first


def test_generation_over_codes_follows_the_uncompressed_model(reference) -> None:
    from pqkv_cli.runtime import attach

    prompt = stdlib_text("evaluation")[2000:6000]
    ids = reference.tokenizer(prompt, return_tensors="pt").input_ids[:, :600]
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = reference.model.generate(ids, **options)
    with attach(reference.model, reference.artifact) as attached:
        cache = attached.new_cache()
        found = reference.model.generate(ids, past_key_values=cache, **options)
    assert cache.num_materialized == 0
    assert cache.num_bytes().total < 0.6 * 2 * 4 * 2 * 64 * 4 * cache.get_seq_length()
    agreeing = (found == expected)[0, 600:].float().mean()
    assert agreeing >= 0.5  # one near tie may part them; after that they are different texts
