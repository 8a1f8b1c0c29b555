"""Two backends for tensors on a CPU: torch, which also serves any other device, and C++ with torch for what it leaves."""

from collections.abc import Sequence

import torch

from pqkv_kernels.cpu.attention import attention_obstacle, exact_obstacle, native_add_exact, native_attention
from pqkv_kernels.cpu.build import native_obstacle
from pqkv_kernels.cpu.encode import NativeEncoder
from pqkv_kernels.cpu.torch_attention import plane_attention
from pqkv_kernels.format.pairs import cut_pairs, planes_of
from pqkv_kernels.format.rotary import Angles
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.format.tokens import CodedTokens, ExactTokens, Part
from pqkv_kernels.reference.attention import add_exact, code_attention
from pqkv_kernels.reference.encode import REFERENCE, Encoder


class TorchBackend:
    """Torch on any device; subspaces that cut pairs of channels are left to the reference."""

    merit = "torch runs everywhere"
    encoder: Encoder = REFERENCE

    def suits(self, device: torch.device) -> bool:
        """Return whether `auto` tries it on `device`."""
        return True

    def obstacle(self, device: torch.device, codecs: Sequence[tuple[CodecTables, CodecTables]]) -> str | None:
        """Return why it cannot run, or None."""
        return None

    def prepare(self, tables: CodecTables) -> None:
        """Make what attention reads of `tables`, once."""
        planes_of(tables)

    def encode(self, x: torch.Tensor, tables: CodecTables, angles: Angles | None) -> torch.Tensor:
        """Encode as `pqkv_kernels.reference.encode.Encoder.encode` does."""
        return self.encoder.encode(x, tables, angles)

    def attend_codes(self, query: torch.Tensor, tokens: CodedTokens, scaling: float, softcap: float | None) -> Part:
        """Attend as `pqkv_kernels.reference.attention.code_attention` does."""
        keys, values = planes_of(tokens.keys), planes_of(tokens.values)
        if keys is None or values is None:
            return code_attention(query, tokens, scaling, softcap)
        return plane_attention(query, tokens, keys, values, scaling, softcap)

    def attend_exact(self, coded: Part, query: torch.Tensor, exact: ExactTokens, scaling: float, softcap: float | None) -> Part:
        """Add exact tokens as `pqkv_kernels.reference.attention.add_exact` does."""
        return add_exact(coded, query, exact, scaling, softcap)


class NativeBackend(TorchBackend):
    """C++ for encoding and for the few queries of a decode step; chunks of a prompt and gradients are torch's."""

    merit = "a C++ compiler has built the kernel for it"
    encoder = NativeEncoder()

    def suits(self, device: torch.device) -> bool:
        """Return whether `auto` tries it on `device`."""
        return device.type == "cpu"

    def obstacle(self, device: torch.device, codecs: Sequence[tuple[CodecTables, CodecTables]]) -> str | None:
        """Return why it cannot run, or None; builds the kernel if it has not been built."""
        if device.type != "cpu":
            return f"the device is {device.type} and the native backend runs on CPUs"
        return native_obstacle() or cut_pairs(codecs)

    def attend_codes(self, query: torch.Tensor, tokens: CodedTokens, scaling: float, softcap: float | None) -> Part:
        """Attend as `pqkv_kernels.reference.attention.code_attention` does."""
        keys, values = planes_of(tokens.keys), planes_of(tokens.values)
        if keys is None or values is None or attention_obstacle(query, tokens):
            return super().attend_codes(query, tokens, scaling, softcap)
        return native_attention(query, tokens, keys, values, scaling, softcap)

    def attend_exact(self, coded: Part, query: torch.Tensor, exact: ExactTokens, scaling: float, softcap: float | None) -> Part:
        """Add exact tokens as `pqkv_kernels.reference.attention.add_exact` does."""
        if exact_obstacle(query, exact):
            return super().attend_exact(coded, query, exact, scaling, softcap)
        return native_add_exact(coded, query, exact, scaling, softcap)
