"""What keys say of the values of their tokens, as a linear map. Knows vectors; nothing of codes.

In code space the keys are the same whatever the gauge of attention (`quantizers.maps`), and every channel of the values has a
regression of its own: so rescaling channels by powers of two changes nothing but the map's own scale.
"""

import torch

# Share of each key channel's moment that is added to it: what few vectors cannot tell from chance is not learned.
RIDGE = 1e-3
# A channel of less variance than this share of its mean square never moves.
STILL = 1e-12


def fit_prediction(keys: torch.Tensor, values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return the map that predicts values from keys with the least weighted squared error, means apart.

    The means are left to the codebooks of what is left over, which hold them at no cost.

    Parameters
    ----------
    keys
        Decoded keys in code space, [Hkv, N, D] fp32.
    values
        Values of the same tokens, in model space, [Hkv, N, D] fp32.
    weights
        What each token counts for, [Hkv, N], or None where all count the same.

    Returns
    -------
    torch.Tensor
        [Hkv, D, D] fp32: ``prediction @ key`` for each head.
    """
    x, y = keys.double(), values.double()
    shares = torch.ones(x.shape[:2], dtype=torch.float64) if weights is None else weights.double()
    shares = (shares / shares.sum(1, keepdim=True))[..., None]
    square = (x.square() * shares).sum(1)
    x, y = x - (x * shares).sum(1, keepdim=True), y - (y * shares).sum(1, keepdim=True)
    # A channel that never moves says nothing: of it is left how its mean was rounded.
    x = torch.where(((x.square() * shares).sum(1) > STILL * square)[:, None], x, 0.0)
    moment, mixed = (x * shares).mT @ x, (x * shares).mT @ y
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    moment = moment + torch.diag_embed(torch.where(diagonal > 0, RIDGE * diagonal, 1.0))
    lower = torch.linalg.cholesky(moment)
    return torch.cholesky_solve(mixed, lower).mT.float().contiguous()
