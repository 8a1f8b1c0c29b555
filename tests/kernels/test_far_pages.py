"""Caches of more bytes than an int32 counts: the right pages are read."""

import pytest
import torch
from kernel_cases import DEVICE, Case, inputs

from pqkv_kernels.dispatch import attend_codes
from pqkv_kernels.format.addresses import page_addresses

pytest.importorskip("triton")
CASE = Case("8", 256, 128, 1, "post", False, None, "exact", 1, torch.float32)


def test_the_last_pages_of_a_slab_of_more_than_two_gigabytes() -> None:
    given = inputs(CASE)
    known = [torch.cat(side, dim=1) for side in (given.key_pages, given.value_pages)]
    num_pages = (1 << 31) // known[0].shape[3] + 5
    slabs = [torch.empty(1, num_pages, 1, known[0].shape[3], dtype=torch.uint8, device=DEVICE) for _ in known]
    for slab, pages in zip(slabs, known, strict=True):
        slab[:, -2:] = pages  # the rest is never touched: a system gives it no memory
    assert slabs[0].numel() > 1 << 31 and int(page_addresses(slabs[:1])[0, -1]) - slabs[0].data_ptr() > 1 << 31
    spans = torch.tensor([[5, 120]], device=DEVICE)
    far = attend_codes(
        "triton", given.query, *[[s] for s in slabs], given.keys, given.values, spans + 64 * (num_pages - 2), 0.1
    )
    near = attend_codes("torch", given.query, *[[p] for p in known], given.keys, given.values, spans, 0.1)
    for a, b in zip(far, near, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
