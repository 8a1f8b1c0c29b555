"""Do the codecs of an artifact give back what they were given? Knows tables and codes; no files and no models.

What the reader's laws cannot see: a table may be finite and of the right shape, and still not survive its own arithmetic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pqkv_cli.artifact.store import Artifact
from pqkv_cli.artifact.tensors import coded_sides
from pqkv_cli.specs import SIDES, Side
from pqkv_kernels.dispatch import fastest_encoder
from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.reference.check_codes import wrong_vectors
from pqkv_kernels.reference.encode import decode, decode_codes, to_code_space

TOLERANCE = 0.01  # of the root mean square of what went in; sound fp32 arithmetic stays a thousand times below
_NUM_PAGES = 2
_SLOWEST_TURN = 1e-4


@dataclass(frozen=True, slots=True)
class CodecTest:
    """What came of testing one codec in all the layers that use it.

    Attributes
    ----------
    codec, side
        Its name, and whether it codes keys or values.
    layers
        Layers that were tested.
    centroids
        Centroids that were coded and decoded.
    page_bytes
        Bytes of the codes of one page of one head.
    faults
        What went wrong, in words; empty for a sound codec.
    """

    codec: str
    side: Side
    layers: int
    centroids: int
    page_bytes: int
    faults: tuple[str, ...]


@torch.no_grad()
def exercise_codecs(artifact: Artifact) -> tuple[CodecTest, ...]:
    """Code and decode with every table of `artifact`, all layers and heads, on the CPU."""
    used: dict[tuple[Side, str], list[int]] = {}
    for index, side, _, _ in coded_sides(artifact.header):
        used.setdefault((side, str(getattr(artifact.header.plan.layers[index], side))), []).append(index)
    ordered = sorted(used.items(), key=lambda item: (SIDES.index(item[0][0]), item[0][1]))
    return tuple(_test_codec(artifact.tables, side, name, layers) for (side, name), layers in ordered)


def _test_codec(tables: Sequence[Mapping[Side, CodecTables] | None], side: Side, name: str, layers: Sequence[int]) -> CodecTest:
    faults, centroids, page_bytes = [], 0, 0
    for index in layers:
        layer = tables[index]
        assert layer is not None  # coded_sides yields only layers with tables
        found = layer[side]
        faults += [f"layer {index}: {fault}" for fault in (*_centroid_faults(found), *_page_faults(found))]
        centroids += sum(book.shape[:-1].numel() for stage in found.codebooks for book in stage)
        page_bytes = found.layout.page_bytes
    return CodecTest(name, side, len(layers), centroids, page_bytes, tuple(faults))


def _centroid_faults(tables: CodecTables) -> list[str]:
    """Return a fault for every codebook in which a centroid is not the one nearest to itself."""
    faults = []
    for stage, index, _, _, _ in tables.layout.spans():
        book = tables.codebooks[stage][index].float().flatten(0, 1)  # [Hkv * M, ksub, dsub]
        found = book.gather(1, fastest_encoder(book.device).nearest(book, book)[..., None].expand(book.shape))
        error = (found - book).square().sum(-1).amax().sqrt() / book.square().sum(-1).amax().sqrt().clamp_min(1e-30)
        if not error <= TOLERANCE:  # a comparison with NaN is false
            faults.append(
                f"a centroid of codebook {stage}.{index} decodes to another one, off by {float(error):.3g} of its size"
            )
    return faults


def _page_faults(tables: CodecTables) -> list[str]:
    """Return what is wrong with pages of known codes that were decoded and encoded again."""
    layout, generator = tables.layout, torch.Generator().manual_seed(0)
    shape = (1, _NUM_PAGES, tables.num_heads, layout.page_bytes)
    pages = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    angles = _angles(tables)
    known = decode_codes(pages, tables)
    vectors = decode(pages, tables, angles)
    encoder = fastest_encoder(vectors.device)
    encoded = encoder.encode(vectors, tables, angles)
    bits = sum(group.num_subspaces * group.nbits for stage in layout.stages for group in stage)
    if tuple(encoded.shape) != shape or shape[-1] * 8 != bits * PAGE_TOKENS:
        return [
            f"pages have {encoded.shape[-1]} bytes per head; expected {bits * PAGE_TOKENS // 8}, as the header's {bits} bits"
        ]
    comparisons = [
        ("undoing the transform and doing it again", encoder.to_code_space(vectors, tables, angles), known),
        (
            "reading back the pages that were written",
            decode(encoded, tables, angles),
            encoder.round_trip(vectors, tables, angles),
        ),
    ]
    if len(layout.stages) == 1:  # sums of several stages are found again only nearly
        comparisons.append(("encoding what codes stand for", decode_codes(encoded, tables), known))
    faults = [fault for what, found, expected in comparisons for fault in _differences(what, found, expected)]
    wrong = wrong_vectors(to_code_space(vectors, tables, angles), encoded, tables).float().mean(dim=(0, 2))  # [Hkv]
    if bool(wrong.any()):
        heads = wrong.nonzero().flatten().tolist()
        faults.append(
            f"up to {float(wrong.max()):.3g} of the vectors get other codes than the reference's for the heads {heads}"
        )
    return faults


def _differences(what: str, found: torch.Tensor, expected: torch.Tensor) -> list[str]:
    size = expected.square().mean(dim=(0, 2, 3)).sqrt().clamp_min(1e-30)
    errors = (found - expected).square().mean(dim=(0, 2, 3)).sqrt() / size  # [Hkv]
    wrong = [head for head, error in enumerate(errors.tolist()) if not error <= TOLERANCE]
    if not wrong:
        return []
    return [
        f"{what} is off by {float(errors[wrong].max()):.3g} of the size for the heads {wrong}; expected at most {TOLERANCE}"
    ]


def _angles(tables: CodecTables) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return angles of made-up positions: whatever the model's are, turning and turning back must cancel."""
    if tables.rotary is None:
        return None
    pairs = tables.rotary.num_pairs
    speeds = _SLOWEST_TURN ** (torch.arange(pairs, dtype=torch.float64) / pairs)
    angle = torch.arange(_NUM_PAGES * PAGE_TOKENS, dtype=torch.float64)[:, None] * speeds
    return angle.cos().float()[None], angle.sin().float()[None]
