"""Cuts a layer's pages where its text is cropped. Codes stay codes: those of the page that is cut are kept decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pqkv_cli.cache.window import coded_then_exact
from pqkv_cli.specs import SIDES
from pqkv_kernels.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from pqkv_cli.cache.layer import QuantizedLayer


def cut_pages(layer: QuantizedLayer, kept: int) -> None:
    """Drop the pages of `layer` that lack slots where `kept` are kept; the window gets what the first of them decodes to.

    Where a row still reads a slot exact (``timeline.stops()``), it goes on doing so. The caller counts the window's tokens.
    """
    if kept >= layer.num_coded:
        return
    page = kept // PAGE_TOKENS
    start = page * PAGE_TOKENS
    for side in SIDES:
        cut = layer.pages[side].page(page).to(layer.device)
        coded = layer.decoded(side, cut, start, start + PAGE_TOKENS, layer.sinks[side])[:, :, : kept - start]
        if layer.first_exact <= start:
            exact = layer.window[side][:, :, : kept - layer.first_exact]
            coded = coded_then_exact(coded, start, exact, layer.first_exact, layer.timeline.stops())
        layer.window[side] = coded
        layer.pages[side].truncate(page)
    layer.first_exact = min(layer.first_exact, start)
