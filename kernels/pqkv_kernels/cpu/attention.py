"""Attention over codes and exact tokens in C++: lays out arguments, shares the work among threads, merges. CPU tensors only."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from pqkv_kernels.cpu.build import SOURCE, found_library, in_shares, native_library
from pqkv_kernels.cpu.structs import Struct, constant, constants, structure
from pqkv_kernels.format.addresses import page_addresses, whole_blocks
from pqkv_kernels.format.pairs import PlaneGroup, Planes, step_factors
from pqkv_kernels.format.rotary import PageAngles
from pqkv_kernels.format.tokens import CodedTokens, ExactTokens, Part
from pqkv_kernels.reference.prediction import plane_prediction

_JOB_SOURCE = SOURCE.with_name("attention_job.h")
_Group, _Side, _Job = (structure(_JOB_SOURCE, name) for name in ("Group", "Side", "AttentionJob"))
_WIDE_PLANES = 8  # codes of so many planes are read row by row
_ROW_MULTIPLE = constant(_JOB_SOURCE, "kRowMultiple")  # rows are filled up to a multiple of so many planes
_FEWEST_ENTRIES = 1 << constant(SOURCE.with_name("codes.h"), "kFewestBits")  # of a table of bytes


@dataclass(frozen=True, slots=True)
class NativeTables:
    """Groups of one codec as the kernel reads them, an array of its ``Group``, and the tensors whose addresses they hold."""

    groups: ctypes.Array[Struct]
    held: tuple[torch.Tensor, ...]


def native_tables(planes: Planes, library: ctypes.CDLL) -> NativeTables:
    """Return the tables of `planes` in the form that `library` was built to read, made once and kept with them."""
    in_bytes = bool(ctypes.c_int.in_dll(library, "pqkv_byte_tables").value)
    key = "native.bytes" if in_bytes else "native.floats"
    tables = planes.derived.get(key)
    if not isinstance(tables, NativeTables):
        tables = planes.derived[key] = _tables(planes, in_bytes)
    return tables


def byte_planes(table: torch.Tensor) -> torch.Tensor:
    """Return the upper three bytes of `table` [..., K, 2] fp32, lowest first: [..., 2, 3, K or 128] uint8.

    Floats are rounded to sixteen significant bits, to even; those of float16 keep their value.
    """
    bits = table.contiguous().view(torch.int32)
    rounded = bits + 0x7F + ((bits >> 8) & 1)
    upper = rounded.contiguous().view(torch.uint8).unflatten(-1, (2, 4))[..., 1:]  # [..., K, 2, 3], little-endian
    missing = max(0, _FEWEST_ENTRIES - table.shape[-2])
    return torch.nn.functional.pad(upper.movedim(-3, -1), (0, missing)).contiguous()


def _tables(planes: Planes, in_bytes: bool) -> NativeTables:
    groups, held = [], []
    for stage in planes.stages:
        entries = stage.entries.view(torch.float32).view(planes.channels.shape[0], -1, 2)
        first = 0
        for part in stage.groups:
            count = part.group.num_subspaces * part.planes_per_code * part.group.num_centroids
            table, is_wide = _table(part, entries[:, first : first + count], in_bytes)
            held.append(table)
            groups.append(_group(part, table, is_wide))
            first += count
    return NativeTables((_Group * len(groups))(*groups), tuple(held))


def _table(part: PlaneGroup, entries: torch.Tensor, in_bytes: bool) -> tuple[torch.Tensor, bool]:
    """Return `entries` [Hkv, M * planes * K, 2] as they are read, plane after plane, and whether codes are of many planes."""
    width, num_centroids = part.planes_per_code, part.group.num_centroids
    table = entries.unflatten(1, (-1, num_centroids))  # [Hkv, M * planes, K, 2]
    if width >= _WIDE_PLANES:  # [Hkv, M, K, 2, planes and zeros]
        rows = table.unflatten(1, (-1, width)).permute(0, 1, 3, 4, 2)
        return torch.nn.functional.pad(rows, (0, -width % _ROW_MULTIPLE)).contiguous(), True
    return byte_planes(table) if in_bytes else table.contiguous(), False


def _group(part: PlaneGroup, table: torch.Tensor, is_wide: bool) -> Struct:
    group = part.group
    head_bytes = table.stride(0) * table.element_size()
    return _Group(
        byte_offset=part.byte_offset,
        num_subspaces=group.num_subspaces,
        nbits=group.nbits,
        planes=part.planes_per_code,
        first_plane=part.first_plane,
        table=table.data_ptr(),
        head_bytes=head_bytes,
        subspace_bytes=head_bytes // group.num_subspaces,
        wide=is_wide,
    )


MOST_QUERIES = 16  # per key/value head; more are served better by matrix products
_CHUNK_PAGES = 64
_MOST_BLOCK = max(constants(_JOB_SOURCE, "kBlocks"))  # queries that share what is looked up
_READ_BEYOND = _ROW_MULTIPLE - 1  # numbers behind a row that may be loaded with it
_THREAD_PAGES = 64  # less work than this is not worth waking another thread


def attention_obstacle(query: torch.Tensor, tokens: CodedTokens) -> str | None:
    """Return why the kernel does not serve `query` [B, Hkv, G, Tq, D], or None: torch does then."""
    if query.shape[2] * query.shape[3] > MOST_QUERIES:
        return f"matrix products serve more than {MOST_QUERIES} queries per head better"
    if query.requires_grad and torch.is_grad_enabled():
        return "a gradient of the queries is wanted"
    if isinstance(tokens.angles, tuple):
        return "every token has angles of its own"
    return None


def native_attention(
    query: torch.Tensor, tokens: CodedTokens, keys: Planes, values: Planes, scaling: float, softcap: float | None = None
) -> Part:
    """Attend as `pqkv_kernels.cpu.torch_attention.plane_attention` does, where no `attention_obstacle` is."""
    batch, heads, group, num_queries, dim = query.shape
    rows = _blocks(query, keys, scaling)
    blocks, block = rows.shape[2:4]
    key_pages, value_pages = whole_blocks(tokens.key_pages), whole_blocks(tokens.value_pages)
    addresses = [page_addresses(pages) for pages in (key_pages, value_pages)]
    num_pages = addresses[0].shape[1]
    chunk_pages = _chunk_pages(num_pages, batch * heads * blocks)
    chunks = -(-num_pages // chunk_pages)
    width = dim if tokens.values.prediction is None else 2 * dim
    out, lse = (rows.new_empty(batch, heads, blocks, chunks, block, *size) for size in ((width,), ()))
    library = native_library()
    tables = [native_tables(planes, library) for planes in (keys, values)]
    held = {"query": rows, "spans": tokens.spans.contiguous(), "out": out, "lse": lse}
    numbers = dict(batch=batch, heads=heads, query_blocks=blocks, block=block, chunks=chunks, chunk_pages=chunk_pages)
    numbers |= {"num_pages": num_pages, "planes": dim // 2, "width": width, "num_pairs": 0, "base_row": 0}
    if isinstance(tokens.angles, PageAngles) and keys.pairs is not None:
        held |= _rotation(keys, tokens.angles)
        base = tokens.angles.base[0]
        numbers |= {"num_pairs": base.shape[2], "base_row": base.shape[1] if base.shape[0] > 1 else 0}
    page_bytes = [pages[0].shape[3] for pages in (key_pages, value_pages)]
    sides = dict(zip(("keys", "values"), map(_side, tables, addresses, page_bytes), strict=True))
    pointers = {name: t.data_ptr() for name, t in held.items()}
    job = _Job(**sides, softcap=softcap or 0.0, **pointers, **numbers)
    # Its loops know every block that `_blocks` makes.
    most = max(1, batch * heads * blocks * num_pages // _THREAD_PAGES)
    in_shares(library.pqkv_attend, job, batch * heads * blocks * chunks, most)
    if chunks > 1:
        in_shares(library.pqkv_merge, job, batch * heads * blocks, 1)
    sums = _unblocked(out, group, num_queries)
    if width > dim:
        from_keys = sums[..., dim:].flatten(2, 3) @ plane_prediction(tokens.keys, tokens.values)
        sums = sums[..., :dim] + from_keys.view(*sums.shape[:-1], dim)
    return sums, _unblocked(lse, group, num_queries)


def _side(tables: NativeTables, pages: torch.Tensor, page_bytes: int) -> Struct:
    groups = ctypes.addressof(tables.groups)
    return _Side(groups=groups, num_groups=len(tables.groups), pages=pages.data_ptr(), page_bytes=page_bytes)


def _blocks(query: torch.Tensor, keys: Planes, scaling: float) -> torch.Tensor:
    """Return scaled queries [B, Hkv, Q, N, D] fp32 in the planes' order.

    Blocks are as few as serve them and as small as these can be, N of 1 to 4; zeros fill up the last.
    """
    batch, heads, group, num_queries, dim = query.shape
    channels = keys.channels[None, :, None].flatten(3).expand(batch, -1, group * num_queries, -1)
    rows = query.flatten(2, 3).gather(3, channels) * scaling
    count = rows.shape[2]
    block = -(-count // -(-count // _MOST_BLOCK))
    if missing := -count % block:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
    return rows.reshape(batch, heads, -1, block, dim)


def _chunk_pages(num_pages: int, num_rows: int) -> int:
    """Return the pages of one part: all threads get work, and a part is no longer than its scores fit into a cache."""
    shares = max(1, torch.get_num_threads() // max(num_rows, 1))
    return max(1, min(_CHUNK_PAGES, -(-num_pages // shares)))


def _rotation(keys: Planes, angles: PageAngles) -> dict[str, torch.Tensor]:
    assert keys.pairs is not None  # asked only of keys that are rotated
    base_cos, base_sin = (t.contiguous() for t in angles.base)
    step = step_factors(angles, keys)
    if keys.steps.get("native.of", (None,))[0] is not step:
        keys.steps["native.step"] = step.real.contiguous(), step.imag.contiguous()
        cos, sin = torch.nn.functional.pad(torch.view_as_real(step.mT.flatten()).mT, (0, _READ_BEYOND))
        keys.steps["native.row"] = cos, sin
        keys.steps["native.of"] = (step, step)
    kept = dict(zip(("step_cos", "step_sin"), keys.steps["native.step"], strict=True))
    kept |= zip(("row_cos", "row_sin"), keys.steps["native.row"], strict=True)
    return {"pair": keys.pairs.contiguous(), "base_cos": base_cos, "base_sin": base_sin, **kept}


def _unblocked(blocks: torch.Tensor, group: int, num_queries: int) -> torch.Tensor:
    """Return [B, Hkv, G, Tq, ...] of the first parts of `blocks` [B, Hkv, Q, C, N, ...]."""
    first, count = blocks[:, :, :, 0], group * num_queries
    if first.shape[2] * first.shape[3] > count:
        first = first.flatten(2, 3)[:, :, :count]
    return first.reshape(*first.shape[:2], group, num_queries, *blocks.shape[5:])


EXACT_SOURCE = Path(__file__).parent / "src" / "exact.cpp"
_Tokens, _ExactJob = (structure(EXACT_SOURCE, name) for name in ("Tokens", "ExactJob"))
MOST_EXACT_QUERIES = 16  # more are served better by matrix products
_DTYPES = (torch.float32, torch.bfloat16)
_THREAD_PRODUCTS = 1 << 19  # less work than so many products is not worth waking another thread


def exact_obstacle(query: torch.Tensor, exact: ExactTokens) -> str | None:
    """Return why the loop does not serve `query` [B, H, Tq, D], or None: the reference does then."""
    tensors = (query, *exact.sinks, *exact.recent)
    if query.shape[2] > MOST_EXACT_QUERIES:
        return f"matrix products serve more than {MOST_EXACT_QUERIES} queries better"
    if query.dtype not in _DTYPES or any(t.dtype != query.dtype for t in tensors):
        return "queries, keys and values are not all float32 or all bfloat16"
    if query.device.type != "cpu" or any(t.stride(3) != 1 for t in tensors):
        return "the numbers of a vector do not lie side by side on a CPU"
    if any(t.requires_grad for t in tensors) and torch.is_grad_enabled():
        return "a gradient is wanted"
    if exact.newest is not None:
        return "the newest token's place is known to the device alone"
    return None if found_library(EXACT_SOURCE) is not None else "this machine cannot compile the loop"


def native_add_exact(coded: Part, query: torch.Tensor, exact: ExactTokens, scaling: float, softcap: float | None) -> Part:
    """Return attention over all tokens as `add_exact` does, where no `exact_obstacle` is."""
    library = found_library(EXACT_SOURCE)
    assert library is not None  # or there would be an obstacle
    out, lse = (part.clone(memory_format=torch.contiguous_format) for part in coded)
    batch, heads, num_queries, dim = query.shape
    kv_heads, num_exact = exact.recent[0].shape[1:3]
    held = {"query": query.float().contiguous(), "starts": exact.starts.contiguous(), "stops": exact.stops.contiguous()}
    numbers = {"num_queries": num_queries, "dim": dim, "num_sinks": exact.sinks[0].shape[2], "num_exact": num_exact}
    job = _ExactJob(
        **dict(zip(("sink_keys", "sink_values", "keys", "values"), map(_tokens, (*exact.sinks, *exact.recent)), strict=True)),
        **{name: t.data_ptr() for name, t in (held | {"out": out, "lse": lse}).items()},
        **numbers,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        first_slot=exact.first_slot,
        is_bfloat16=query.dtype == torch.bfloat16,
        scaling=scaling,
        softcap=softcap or 0.0,
    )
    in_shares(library.pqkv_exact, job, batch * kv_heads, max(1, query.numel() * num_exact // _THREAD_PRODUCTS))
    return out, lse


def _tokens(t: torch.Tensor) -> Struct:
    row, head, token, _ = t.stride()
    return _Tokens(data=t.data_ptr(), row=row, head=head, token=token)
