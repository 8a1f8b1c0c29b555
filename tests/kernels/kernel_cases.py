"""Awkward cases for attention over codes: every pair of values of any two factors occurs in one of them."""

from dataclasses import dataclass, fields, replace
from itertools import combinations, product

import torch
from tests_support import random_codebooks

from pqkv_kernels.format.layout import CodeGroup, CodeLayout, RotaryLayout
from pqkv_kernels.format.rotary import Angles, PageAngles
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.format.tokens import CodedTokens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    nbits: str
    dim: int
    num_tokens: int
    group_size: int
    turn: str
    unequal: bool
    softcap: float | None
    config: str
    num_queries: int
    dtype: torch.dtype
    predicted: bool = False

    def __str__(self) -> str:
        return "-".join(str(getattr(self, field.name)).removeprefix("torch.") for field in fields(self))


FACTORS = (
    ("1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "8+6+4", "4,4", "w8,4", "w10,8+6"),
    (64, 80, 96, 128, 256),
    (0, 1, 63, 257),
    (1, 4, 7),
    ("pages", "tokens", "interleaved", "partial", "post"),
    (False, True),
    (None, 5.0),
    ("exact", "fast"),
    (1, 3),
    (torch.float32, torch.float16),
    (False, True),
)


def pairwise_cases() -> list[Case]:
    """A greedy pairwise cover, the same on every machine."""
    wanted = {(i, a, j, b) for i, j in combinations(range(len(FACTORS)), 2) for a, b in product(FACTORS[i], FACTORS[j])}
    order = sorted(wanted, key=str)
    cases = []
    while order:
        i, a, j, b = order[0]
        chosen = {i: a, j: b}
        for k, values in enumerate(FACTORS):
            if k not in chosen:
                chosen[k] = max(values, key=lambda v: sum(_pair(k, v, m, chosen[m]) in wanted for m in chosen))
        covered = {_pair(p, chosen[p], q, chosen[q]) for p, q in combinations(range(len(FACTORS)), 2)}
        wanted -= covered
        order = [pair for pair in order if pair in wanted]
        cases.append(Case(*(chosen[k] for k in range(len(FACTORS)))))
    return cases


def _pair(i, a, j, b):
    return (i, a, j, b) if i < j else (j, b, i, a)


def layout_of(form: str, dim: int) -> CodeLayout:
    """Pairs of channels, or four for the narrowest codes, or as many as follow an "x".

    "a+b" are groups of one stage, "a,b" stages, "w" is one code.
    """
    stages = []
    for stage in form.split(","):
        if stage.startswith("w"):
            stages.append((CodeGroup(1, int(stage[1:]), dim),))
            continue
        if "x" in stage:
            nbits, subspace_dim = (int(n) for n in stage.split("x"))
            stages.append((CodeGroup(dim // subspace_dim, nbits, subspace_dim),))
            continue
        widths = [int(n) for n in stage.split("+")]
        pairs = [dim // 2 // len(widths)] * len(widths)
        pairs[0] += dim // 2 - sum(pairs)
        stages.append(
            tuple(
                CodeGroup(n // 2, w, 4) if len(widths) == 1 and w < 4 and n % 2 == 0 else CodeGroup(n, w, 2)
                for n, w in zip(pairs, widths, strict=True)
            )
        )
    return CodeLayout(tuple(stages))


@dataclass(frozen=True)
class Inputs:
    query: torch.Tensor
    tokens: CodedTokens

    @property
    def keys(self) -> CodecTables:
        return self.tokens.keys

    @property
    def values(self) -> CodecTables:
        return self.tokens.values

    @property
    def angles(self) -> Angles | PageAngles | None:
        return self.tokens.angles

    @property
    def pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All pages of the keys, and of the values, as one block each."""
        return torch.cat(list(self.tokens.key_pages), 1), torch.cat(list(self.tokens.value_pages), 1)


def inputs(case: Case, heads: int = 1) -> Inputs:
    """Random tables, pages and queries; pages in two blocks where there are two, unequal rows where asked for."""
    generator = torch.Generator().manual_seed(len(str(case)) + case.dim)
    layout, rotary = layout_of(case.nbits, case.dim), _rotary(case)
    batch, num_pages = 2 if case.unequal else 1, -(-case.num_tokens // 64)
    keys = CodecTables(layout, random_codebooks(layout, heads, generator), *_maps(case.dim, heads, rotary, generator), rotary)
    values = CodecTables(layout, random_codebooks(layout, heads, generator))
    if case.predicted:
        prediction = torch.randn(heads, case.dim, case.dim, generator=generator) / case.dim**0.5
        values = replace(values, prediction=prediction.half())
    pages = [
        torch.randint(0, 256, (batch, num_pages, heads, layout.page_bytes), dtype=torch.uint8, generator=generator)
        for _ in range(2)
    ]
    counts = torch.tensor([case.num_tokens, case.num_tokens // 2][:batch])  # unequal: the second row is shorter, or empty
    first = (64 * num_pages - counts) // 2
    spans = torch.stack((first, first + counts), dim=1)
    query = torch.randn(batch, heads * case.group_size, case.num_queries, case.dim, generator=generator).to(case.dtype)
    cut = num_pages // 2
    blocks = [[side[:, :cut], side[:, cut:]] if cut else [side] for side in pages]
    moved = [[block.to(DEVICE) for block in side] for side in blocks]
    angles = _angles(case, rotary, batch, num_pages)
    tokens = CodedTokens(*moved, keys.to(DEVICE), values.to(DEVICE), spans.to(DEVICE), angles)
    return Inputs(query.to(DEVICE), tokens)


def _rotary(case: Case) -> RotaryLayout | None:
    if case.turn == "post":
        return None
    return RotaryLayout(case.dim // 2 if case.turn == "partial" else case.dim, case.turn == "interleaved")


def _maps(dim: int, heads: int, rotary: RotaryLayout | None, generator: torch.Generator):
    """A map and a permutation: whole pairs are permuted where there are pairs."""
    if rotary is None:
        permutation = torch.stack([torch.randperm(dim, generator=generator) for _ in range(heads)])
        return 0.5 + torch.rand(heads, dim, generator=generator), permutation.to(torch.int16)
    blocks = torch.tensor(rotary.blocks(dim))
    order = torch.stack([torch.randperm(dim // 2, generator=generator) for _ in range(heads)])
    return torch.eye(2) + 0.3 * torch.randn(heads, dim // 2, 2, 2, generator=generator), blocks[order].flatten(1).to(
        torch.int16
    )


def _angles(case: Case, rotary: RotaryLayout | None, batch: int, num_pages: int) -> Angles | PageAngles | None:
    if rotary is None:
        return None
    rate = torch.logspace(0, -3, rotary.num_pairs)
    position = torch.arange(64 * num_pages) + 100 * torch.arange(batch)[:, None]
    if case.turn == "tokens":
        position = position * 3  # gaps between positions: only angles per token are right
        return _unit(position[..., None] * rate)
    return PageAngles(_unit(position[:, ::64, None] * rate), _unit(torch.arange(64)[:, None] * rate))


def _unit(angle: torch.Tensor) -> Angles:
    return angle.cos().to(DEVICE), angle.sin().to(DEVICE)
