"""What kernels must know of the Triton that compiles them; `tests/kernels/test_triton_compiles.py` counts what it does."""

import triton


def dot_width() -> int:
    """Return how many neighbours along a sum a lane holds in the left operand of products of float16, as Triton chooses.

    Operands are put together in that order, so that no element leaves its lane; in another order answers are the same, but
    elements travel through shared memory.
    """
    return 2 if _version() >= (3, 8) else 4


def least_columns() -> int:
    """Return how few columns the right operand of a product may have."""
    return 8 if _version() >= (3, 5) else 16


def launch_options(num_warps: int, num_stages: int = 1, max_registers: int = 0) -> dict[str, int]:
    """Return how a kernel is compiled for a launch.

    Parameters
    ----------
    num_warps
        Of a program.
    num_stages
        How many rounds of a loop are under way at a time: with more than one, loads run ahead through shared memory.
    max_registers
        Per lane; 0 leaves it to the compiler.

    Notes
    -----
    fp32 products are fused with the sums they are added to, as the counts of instructions assume; from version 3.10 on Triton
    would not do so unasked.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return {**options, "maxnreg": max_registers} if max_registers else options


def _version() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)
