"""What a choice of codecs costs on held-out windows, for whoever chooses between them. Knows codecs, no artifacts or tasks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pqkv_cli.evaluation.text_windows import diverge
from pqkv_cli.hf.names import cache_argument
from pqkv_cli.quantizers.codec import ExactCodec, ProductCodec, VectorCodec
from pqkv_cli.runtime.attach import simulate
from pqkv_cli.specs import SIDES, Side
from pqkv_kernels.format.tables import CodecTables

Codecs = Sequence[dict[Side, VectorCodec] | None]


def one_side_alone(num_layers: int, index: int, side: Side, tables: CodecTables) -> Codecs:
    """Return the choice that quantizes one side of layer `index` and leaves everything else as it is."""
    codecs: list[dict[Side, VectorCodec] | None] = [None] * num_layers
    codecs[index] = {other: ExactCodec() for other in SIDES} | {side: ProductCodec(tables)}
    return codecs


@torch.no_grad()
def held_out_losses(
    model: Any,
    windows: torch.Tensor,
    choices: Sequence[Codecs],
    on_progress: Callable[[int, int], None] | None = None,
    position_offset: int = 0,
) -> torch.Tensor:
    """Return the mean KL divergence of each window and choice from the uncompressed model, mode `all`.

    Parameters
    ----------
    model
        A transformers causal language model.
    windows
        [N, T] int64 token ids.
    choices
        Codecs of all layers, once per choice.
    on_progress
        Called with (windows done, N).
    position_offset
        Position of every window's first token.

    Returns
    -------
    torch.Tensor
        [N, len(choices)] fp64, bits per token.

    Raises
    ------
    DataError
        If logits are not finite.
    """
    losses = torch.zeros(len(windows), len(choices), dtype=torch.float64)
    for row, window in enumerate(windows.to(model.device)):
        ids, targets = window[None], window[1:]
        positions = torch.arange(len(window), device=ids.device)[None] + position_offset
        baseline = model(ids, position_ids=positions, use_cache=False).logits[0, :-1]
        for column, codecs in enumerate(choices):
            with simulate(model, codecs) as simulation:
                cache = simulation.new_cache()
                quantized = model(ids, position_ids=positions, **cache_argument(model, cache), use_cache=True).logits[0, :-1]
            losses[row, column] = diverge(baseline, quantized, targets).kl_bits.mean()
        if on_progress is not None:
            on_progress(row + 1, len(windows))
    return losses
