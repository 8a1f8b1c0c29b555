"""How far two next-token distributions are apart. Knows logits only."""

from dataclasses import dataclass, fields

import torch

from pqkv_cli.errors import DataError

_LN2 = 0.6931471805599453


@dataclass(frozen=True, slots=True)
class Divergence:
    """Per-token comparison of an uncompressed and a compressed model, each [N] fp64 on the CPU.

    Attributes
    ----------
    kl_bits
        KL divergence of the compressed from the uncompressed distribution, bits.
    agrees
        1 where both have the same most likely token.
    top5
        Share of the uncompressed model's five most likely tokens that are among the compressed model's five.
    baseline_nll, quantized_nll
        Negative log-likelihood of the true next token, nats.
    """

    kl_bits: torch.Tensor
    agrees: torch.Tensor
    top5: torch.Tensor
    baseline_nll: torch.Tensor
    quantized_nll: torch.Tensor


def diverge(baseline: torch.Tensor, quantized: torch.Tensor, targets: torch.Tensor) -> Divergence:
    """Compare logits [N, V] with the true next tokens `targets` [N].

    Raises
    ------
    DataError
        If logits are not finite.
    """
    for name, logits in (("uncompressed", baseline), ("compressed", quantized)):
        if not bool(torch.isfinite(logits).all()):
            raise DataError(f"the {name} model gives logits that are not finite; expected numbers: try --dtype float32")
    log_p, log_q = baseline.float().log_softmax(-1), quantized.float().log_softmax(-1)
    kl_bits = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0) / _LN2
    columns = targets[:, None].to(log_p.device)
    return Divergence(
        kl_bits=kl_bits.double().cpu(),
        agrees=(baseline.argmax(-1) == quantized.argmax(-1)).double().cpu(),
        top5=_shared_best(baseline, quantized, 5).cpu(),
        baseline_nll=-log_p.gather(-1, columns)[:, 0].double().cpu(),
        quantized_nll=-log_q.gather(-1, columns)[:, 0].double().cpu(),
    )


def _shared_best(baseline: torch.Tensor, quantized: torch.Tensor, count: int) -> torch.Tensor:
    count = min(count, baseline.shape[-1])
    first, second = baseline.topk(count).indices, quantized.topk(count).indices
    return (first[..., None] == second[..., None, :]).any(-1).double().mean(-1)


def joined(parts: list[Divergence]) -> Divergence:
    """Return all tokens of `parts` in one."""
    return Divergence(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Divergence)))
