"""Which backend attends to the codes of a model, and why. Knows no cache."""

from collections.abc import Mapping, Sequence

import torch

from pqkv_cli.errors import CacheError
from pqkv_cli.specs import SIDES, Side
from pqkv_kernels.dispatch import BackendRequest, Choice, choose_backend
from pqkv_kernels.errors import KernelError
from pqkv_kernels.tables import CodecTables


def backend_for(requested: BackendRequest, device: torch.device, tables: Sequence[Mapping[Side, CodecTables] | None]) -> Choice:
    """Return what attends to the codes of the layers that have `tables`, on `device`.

    Raises
    ------
    CacheError
        If the backend is unknown, or was asked for by name and cannot run.
    """
    try:
        return choose_backend(requested, device, [(t[SIDES[0]], t[SIDES[1]]) for t in tables if t is not None])
    except KernelError as error:
        raise CacheError(str(error)) from error
