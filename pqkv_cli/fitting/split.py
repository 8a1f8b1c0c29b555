"""Which sampled vectors are fitted and which only judge. Knows positions of samples; nothing of what is fitted.

Whole windows judge: neighbours of a fitted vector are so like it that they would find codebooks better than new text does.
"""

import torch

# One window in so many judges, from so many vectors on: of fewer none can be spared.
JUDGED_EVERY = 16
LEAST_SPLIT = 4096


def split_samples(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of the vectors to fit, and of those that errors are measured on; all twice, where there are few.

    Parameters
    ----------
    positions
        [N] integers, of the samples in their windows, window after window.
    """
    numbers = torch.arange(len(positions))
    window = torch.cat((positions.new_zeros(1, dtype=torch.int64), (positions[1:] <= positions[:-1]).cumsum(0)))
    num_windows = int(window[-1]) + 1
    if len(positions) < LEAST_SPLIT or num_windows < 2:
        return numbers, numbers
    judges = window % JUDGED_EVERY == min(JUDGED_EVERY, num_windows) - 1
    return numbers[~judges], numbers[judges]


def num_fitted(positions: torch.Tensor, most: int) -> int:
    """Return how many of the samples at `positions` [N] are fitted where one in so many is taken, to stay within `most`."""
    fitted = len(split_samples(positions)[0])
    return -(-fitted // stride_within(fitted, most))


def stride_within(count: int, most: int) -> int:
    """Return the least `n` such that one in `n` of `count` vectors are at most `most`."""
    return -(-count // most)
