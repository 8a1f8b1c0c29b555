"""Launches kernels for a GPU that is not here: everything is done but the launch itself, so that arguments meet the compiler.

Arguments: which share of the launches, and how many there are. Prints the names of the kernels that were compiled, for sm_90.
"""

import sys
from typing import Any

import torch
from kernel_cases import Case, inputs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from pqkv_kernels.format.rotary import token_angles
from pqkv_kernels.gpu.attention import triton_attention
from pqkv_kernels.gpu.config import EXACT, DecodeConfig
from pqkv_kernels.gpu.encode import triton_encode
from pqkv_kernels.reference.attention import code_queries

FAST, TABLE = DecodeConfig(), DecodeConfig(key_scores="table")
WHOLE = torch.float16
ATTENTION = (
    (Case("8", 64, 130, 4, "pages", True, 5.0, "", 1, WHOLE), 2, (FAST,)),
    (Case("4", 64, 63, 1, "pages", False, None, "", 1, WHOLE), 1, (FAST, EXACT)),
    (Case("4,4", 64, 130, 4, "pages", False, 5.0, "", 1, WHOLE), 2, (FAST,)),
    (Case("4x4,4x4", 64, 130, 1, "pages", True, None, "", 1, WHOLE), 2, (FAST,)),
    (Case("4,4,4", 64, 63, 7, "post", False, None, "", 2, WHOLE), 2, (FAST,)),
    (Case("8+6+4", 96, 130, 4, "tokens", True, None, "", 3, WHOLE), 2, (FAST,)),
    (Case("w8,4", 80, 130, 1, "partial", False, None, "", 1, WHOLE), 1, (FAST,)),
    (Case("w10,8+6", 64, 130, 7, "interleaved", False, None, "", 3, WHOLE), 1, (FAST,)),
    (Case("7", 64, 130, 1, "post", True, 5.0, "", 1, WHOLE), 2, (TABLE, EXACT)),
    (Case("8", 64, 130, 4, "pages", False, None, "", 20, WHOLE), 2, (FAST,)),
)
ENCODING = ("1", "2", "8", "4,4", "8+6+4", "w8,4", "w10,8+6")


class StandIn:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def attend(case: Case, heads: int, config: DecodeConfig) -> None:
    given = inputs(case, heads)
    query = code_queries(given.query, given.keys)
    triton_attention(query, given.tokens, 0.1, case.softcap, config)


def encode(nbits: str, turn: str) -> None:
    given = inputs(Case(nbits, 64, 128, 1, turn, True, None, "", 1, WHOLE), 2)
    x = torch.zeros(len(given.query), 128, 2, 64, dtype=WHOLE).transpose(1, 2)
    triton_encode(x, given.keys, token_angles(given.angles))


def main() -> None:
    launched, launch = set(), JITFunction.run

    def compiled(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        launched.add(kernel.__name__)
        return launch(kernel, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compiled
    driver.set_active(StandIn())
    plan: list[tuple[Any, ...]] = [(attend, case, heads, config) for case, heads, configs in ATTENTION for config in configs]
    plan += [(encode, nbits, turn) for nbits in ENCODING for turn in ("pages", "post")]
    share, shares = map(int, sys.argv[1:])
    for function, *args in plan[share::shares]:
        function(*args)
    print(*sorted(launched))


if __name__ == "__main__":
    main()
