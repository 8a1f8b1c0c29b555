"""JSON of one codec to `CodecSpec`. Knows no layer and no file."""

import re

from pqkv_cli.artifact.fields import MAX_COUNT, Node
from pqkv_cli.artifact.schema import MAX_GROUPS, MAX_STAGES
from pqkv_cli.specs import CodecSpec, KeySpace, MapKind
from pqkv_kernels.layout import SUPPORTED_NBITS, CodeGroup, CodeLayout

_CODEC_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_MAPS: dict[str, MapKind] = {
    "identity": "identity",
    "pair_scale": "scale",
    "pair_metric": "blocks",
    "scale": "scale",
    "matrix": "matrix",
}
_KEY_SPACES: dict[object, KeySpace | None] = {None: None, "pre_rope": "pre_rope", "post_rope": "post_rope"}


def read_codec(name: str, node: Node) -> CodecSpec | None:
    """Return the codec at `node`, None where it has a fault."""
    num_faults = len(node.faults)
    if not _CODEC_NAME.fullmatch(name):
        node.fault("has a name that cannot be part of a tensor name; expected a-z, then a-z, 0-9, _ or -, at most 32 in all")
    kind, key_space, map_, stages = node.fields("kind", "key_space", "map", "stages")
    kind.choice(["pq"])
    space = None if key_space.value is None else key_space.choice(["pre_rope", "post_rope"])
    word = map_.choice(_MAPS)
    if (space == "pre_rope") != (word in ("pair_scale", "pair_metric")) and word in _MAPS and word != "identity":
        allowed = "identity, pair_scale or pair_metric" if space == "pre_rope" else "identity, scale or matrix"
        map_.fault(f"is {word!r}; expected {allowed} with key_space {space or 'null'}")
    rows = [_stage(stage) for stage in stages.items()]
    if not 1 <= len(rows) <= MAX_STAGES:
        stages.fault(f"holds {len(rows)} stages; expected 1 to {MAX_STAGES}")
    widths = sorted({sum(group.num_channels for group in row) for row in rows})
    if len(widths) > 1 and len(node.faults) == num_faults:
        stages.fault(f"cover {widths} channels; expected the same number in each stage")
    if len(node.faults) > num_faults:
        return None
    return CodecSpec(CodeLayout(tuple(rows)), _MAPS[str(word)], _KEY_SPACES[space])


def _stage(node: Node) -> tuple[CodeGroup, ...]:
    (groups,) = node.fields("groups")
    items = groups.items()
    if not 1 <= len(items) <= MAX_GROUPS:
        groups.fault(f"holds {len(items)} groups; expected 1 to {MAX_GROUPS} (each compiles its own kernel)")
    row: list[CodeGroup] = []
    for item in items:
        group = _group(item, sum(group.num_channels for group in row))
        if group is not None:
            row.append(group)
    return tuple(row)


def _group(node: Node, first_channel: int) -> CodeGroup | None:
    num_faults = len(node.faults)
    count, nbits, dims = node.fields("M", "nbits", "dims")
    num_subspaces, bits = count.integer(1, MAX_COUNT), nbits.choice(SUPPORTED_NBITS)
    subspaces = [[channel.integer(0, MAX_COUNT) for channel in subspace.items()] for subspace in dims.items()]
    if len(node.faults) > num_faults:
        return None
    widths = {len(subspace) for subspace in subspaces}
    if len(subspaces) != num_subspaces or len(widths) != 1 or 0 in widths:
        dims.fault(f"holds {len(subspaces)} subspaces of {sorted(widths)} channels; expected M = {num_subspaces} of equal size")
        return None
    for expected, channel in enumerate((c for subspace in subspaces for c in subspace), start=first_channel):
        if channel != expected:
            found = f"names channel {channel} where {expected} is due"
            dims.fault(f"{found}; version 1 covers the permuted channels 0, 1, 2, ... in order")
            return None
    return CodeGroup(num_subspaces, int(bits or 0), widths.pop())
