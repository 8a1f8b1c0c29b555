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


def _version() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)
