import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pqkv_cli.errors import DataError
from pqkv_cli.evaluation.text_windows import diverge, joined


def dull(p: torch.Tensor, q: torch.Tensor, target: int) -> tuple[float, float, float]:
    """KL in bits and both negative log-likelihoods in nats, entry by entry in double precision."""
    p, q = (torch.exp(x.double() - x.double().max()) for x in (p, q))
    p, q = (p / p.sum()).tolist(), (q / q.sum()).tolist()
    kl = math.fsum(a * math.log2(a / b) for a, b in zip(p, q, strict=True) if a)
    return kl, -math.log(p[target]), -math.log(q[target])


@given(st.integers(0, 10_000), st.floats(0.01, 8), st.sampled_from([torch.float32, torch.bfloat16]))
def test_agrees_with_the_definition(seed: int, scale: float, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    p, q = ((torch.randn(3, 17, generator=g) * scale).to(dtype) for _ in range(2))
    targets = torch.randint(0, 17, (3,), generator=g)
    found = diverge(p, q, targets)
    for row in range(3):
        expected = dull(p[row], q[row], int(targets[row]))
        numbers = [float(x[row]) for x in (found.kl_bits, found.baseline_nll, found.quantized_nll)]
        assert numbers == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert float(found.agrees[row]) == float(int(p[row].argmax()) == int(q[row].argmax()))


def test_a_distribution_does_not_diverge_from_itself() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 9
    found = diverge(logits, logits + 3.0, torch.zeros(50, dtype=torch.int64))  # a constant changes no probability
    assert float(found.kl_bits.max()) < 1e-5
    assert bool((found.agrees == 1).all())
    assert torch.equal(diverge(logits, logits, torch.zeros(50, dtype=torch.int64)).kl_bits, torch.zeros(50).double())


@pytest.mark.parametrize(
    ("p", "q", "bits"),
    [((0.5, 0.5), (0.25, 0.75), 0.5 * 1 + 0.5 * math.log2(2 / 3)), ((0.25, 0.75), (0.5, 0.5), 1 - 0.8112781244591328)],
)
def test_two_symbols(p: tuple[float, float], q: tuple[float, float], bits: float) -> None:
    found = diverge(torch.tensor([p]).log(), torch.tensor([q]).log(), torch.tensor([1]))
    assert float(found.kl_bits) == pytest.approx(bits, rel=1e-5)
    assert float(found.baseline_nll) == pytest.approx(-math.log(p[1]), rel=1e-6)
    assert float(found.quantized_nll) == pytest.approx(-math.log(q[1]), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["uncompressed", "compressed"])
def test_numbers_that_are_none_are_refused(bad: float, side: str) -> None:
    good, broken = torch.zeros(2, 3), torch.zeros(2, 3)
    broken[1, 2] = bad
    pair = (broken, good) if side == "uncompressed" else (good, broken)
    with pytest.raises(DataError, match=f"the {side} model gives logits that are not finite"):
        diverge(*pair, torch.zeros(2, dtype=torch.int64))


def test_joined_keeps_order_and_precision() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(5)
    whole = diverge(logits[0], logits[1], targets)
    parts = joined([diverge(logits[0, s], logits[1, s], targets[s]) for s in (slice(0, 2), slice(2, 5))])
    assert parts.kl_bits.dtype == torch.float64
    torch.testing.assert_close(parts.kl_bits, whole.kl_bits, rtol=1e-6, atol=0)
    assert torch.equal(parts.agrees, whole.agrees)
