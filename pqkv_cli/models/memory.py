"""Gives memory back after it has run out, so that work may go on with less. Knows torch's allocators."""

import gc

import torch


def free_memory() -> None:
    """Drop what nobody refers to any more, and hand devices' unused blocks back to them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.xpu.is_available():
        torch.xpu.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
