"""Which tokens are kept and which queries measure attention: drawn up front, from seeds alone. Knows no model."""

import torch


def draw_sample(num_windows: int, window_tokens: int, size: int, seed: int) -> torch.Tensor:
    """Return sorted indices ``window * window_tokens + position`` of a uniform sample without replacement.

    Every token has a random priority and the `size` smallest are kept, all tokens if there are fewer. The sample is known
    before the first forward pass, so what is not kept is never copied.
    """
    priorities = token_priorities(num_windows, window_tokens, seed)
    kept = torch.topk(priorities, min(size, len(priorities)), largest=False, sorted=False).indices
    return kept.sort().values


def token_priorities(num_windows: int, window_tokens: int, seed: int) -> torch.Tensor:
    """Return the random priority of every token, [num_windows * window_tokens] fp64 in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_windows * window_tokens, generator=generator, dtype=torch.float64)


def draw_queries(window: int, window_tokens: int, count: int, seed: int) -> torch.Tensor:
    """Return `count` (or all) sorted query positions of one window: a random one from each of `count` equal stretches.

    They depend on the window's number and not on its batch.
    """
    count = min(count, window_tokens)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + window + 1)
    bounds = torch.arange(count + 1) * window_tokens // count
    lengths = bounds[1:] - bounds[:-1]
    return bounds[:-1] + (torch.rand(count, generator=generator, dtype=torch.float64) * lengths).long()
