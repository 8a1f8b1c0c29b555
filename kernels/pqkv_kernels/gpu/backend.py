"""The backend of Triton kernels. Triton is optional and slow to import, so this file imports it only when it is needed."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from pqkv_kernels.format.pairs import cut_pairs
from pqkv_kernels.format.rotary import Angles
from pqkv_kernels.format.tables import CodecTables, channel_tables
from pqkv_kernels.format.tokens import CodedTokens, ExactTokens, Part
from pqkv_kernels.reference.attention import add_exact


class TritonBackend:
    """Triton kernels on a CUDA GPU, or in Triton's interpreter; exact tokens are torch's."""

    merit = "Triton is installed"

    def suits(self, device: torch.device) -> bool:
        """Return whether `auto` tries it on `device`."""
        return device.type != "cpu"

    def obstacle(self, device: torch.device, codecs: Sequence[tuple[CodecTables, CodecTables]]) -> str | None:
        """Return why it cannot run, or None."""
        if find_spec("triton") is None:
            return "Triton is not installed (pip install 'pqkv[gpu]')"
        if device.type != "cuda" and not _kernels("attention").is_interpreted():
            return f"the device is {device.type} and Triton's kernels need a CUDA GPU"
        return cut_pairs(codecs)

    def prepare(self, tables: CodecTables) -> None:
        """Make what encoding and attention read of `tables`, once."""
        _kernels("attention").prepare(tables)
        channel_tables(tables)

    def encode(self, x: torch.Tensor, tables: CodecTables, angles: Angles | None) -> torch.Tensor:
        """Encode as `pqkv_kernels.reference.encode.Encoder.encode` does."""
        pages: torch.Tensor = _kernels("encode").triton_encode(x, tables, angles)
        return pages

    def attend_codes(self, query: torch.Tensor, tokens: CodedTokens, scaling: float, softcap: float | None) -> Part:
        """Attend as `pqkv_kernels.reference.attention.code_attention` does."""
        part: Part = _kernels("attention").triton_attention(query, tokens, scaling, softcap)
        return part

    def attend_exact(self, coded: Part, query: torch.Tensor, exact: ExactTokens, scaling: float, softcap: float | None) -> Part:
        """Add exact tokens as `pqkv_kernels.reference.attention.add_exact` does."""
        return add_exact(coded, query, exact, scaling, softcap)


def _kernels(name: str) -> Any:
    return import_module(f"pqkv_kernels.gpu.{name}")
