"""Caches of more bytes than an int32 counts: the right pages are read."""

import pytest
import torch
from kernel_cases import DEVICE, Case, inputs

from pqkv_kernels.dispatch import attend_codes
from pqkv_kernels.format.addresses import page_addresses
from pqkv_kernels.format.tokens import CodedTokens

pytest.importorskip("triton")
CASE = Case("8", 256, 128, 1, "post", False, None, "exact", 1, torch.float32)


def test_the_last_pages_of_a_block_of_more_than_two_gigabytes() -> None:
    given = inputs(CASE)
    known = given.pages
    num_pages = (1 << 31) // known[0].shape[3] + 5
    blocks = [torch.empty(1, num_pages, 1, known[0].shape[3], dtype=torch.uint8, device=DEVICE) for _ in known]
    for block, pages in zip(blocks, known, strict=True):
        block[:, -2:] = pages  # the rest is never touched: a system gives it no memory
    assert blocks[0].numel() > 1 << 31 and int(page_addresses(blocks[:1])[0, -1]) - blocks[0].data_ptr() > 1 << 31
    spans = torch.tensor([[5, 120]], device=DEVICE)
    tables = given.keys, given.values
    far = CodedTokens([blocks[0]], [blocks[1]], *tables, spans + 64 * (num_pages - 2))
    near = CodedTokens([known[0]], [known[1]], *tables, spans)
    answers = attend_codes("triton", given.query, far, 0.1), attend_codes("torch", given.query, near, 0.1)
    for a, b in zip(*answers, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
