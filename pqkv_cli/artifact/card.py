"""The files for people beside an artifact: its header as readable JSON and its model card. Readers never open them."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pqkv_cli.artifact.header import header_document, map_word
from pqkv_cli.artifact.schema import Header
from pqkv_cli.artifact.summary import Summary, summarize_header
from pqkv_cli.errors import ArtifactError
from pqkv_cli.files import write_text
from pqkv_cli.specs import CodecSpec

_USES = {None: "values", "pre_rope": "keys before RoPE", "post_rope": "keys after RoPE"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def model_card(header: Header, rows: Sequence[Mapping[str, object]] = ()) -> str:
    """Return the model card of the artifact with this `header`.

    Parameters
    ----------
    rows
        Results, one mapping from column to value per row; columns appear in the order in which the rows first name them.
    """
    summary = summarize_header(header)
    sections = [
        _front_matter(header),
        f"# {_escaped(header.model.label)}, key/value cache at {summary.total_bits:.3g} bits per channel",
        "Codebooks that compress the key/value cache of this model by product quantization. Made by "
        f"pqkv {_escaped(header.pqkv_version)}; the weights of the model are unchanged and not included.",
        "## What it holds",
        _table([("", ""), *_facts(header, summary)]),
        "## Codecs",
        _table([("codec", "for", "transform", "subspaces x bits", "bits per channel", "layers"), *_codec_rows(header)]),
        "## How to load it",
        _loading(header),
        "## Results",
        _results(rows),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(header: Header) -> str:
    lines = ["---", "library_name: pqkv", "tags: [kv-cache, quantization, product-quantization]"]
    if _HUB_ID.fullmatch(header.model.label):
        lines.append(f"base_model: {header.model.label}")
    return "\n".join([*lines, "---"])


def _facts(header: Header, summary: Summary) -> list[tuple[str, str]]:
    num_coded = sum(row.keys is not None for row in summary.layers)
    cached = summary.code_bytes_per_token + summary.dense_bytes_per_token
    calibration = header.calibration
    bits = f"{summary.total_bits:.4g} (keys {summary.keys_bits:.4g}, values {summary.values_bits:.4g})"
    return [
        ("base model", _escaped(header.model.label)),
        ("content hash (SHA-256)", f"`{header.sha256}`"),
        ("bits of code per channel", bits),
        ("cache bytes per token", f"{cached:,.1f} (bf16: {summary.baseline_bytes_per_token:,})"),
        ("codebooks and transforms", f"{summary.table_bytes:,} bytes"),
        ("kept exact", f"{summary.cache.num_sinks} first tokens, at least {summary.cache.window_tokens} most recent ones"),
        ("layers", f"{num_coded} compressed, {len(summary.layers) - num_coded} dense"),
        ("calibration", f"{calibration.num_samples} windows of {calibration.seq_len} tokens, seed {calibration.seed}"),
        ("recipe hash", f"`{header.recipe_sha256}`"),
    ]


def _codec_rows(header: Header) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, codec in sorted(header.plan.codecs.items()):
        used = [i for i, layer in enumerate(header.plan.layers) if name in (layer.keys, layer.values)]
        bits = f"{codec.layout.bits_per_channel:.4g}"
        rows.append((name, _USES[codec.key_space], map_word(codec), _shape(codec), bits, str(len(used))))
    return rows


def _shape(codec: CodecSpec) -> str:
    stages = (", ".join(f"{g.num_subspaces} x {g.nbits}" for g in stage) for stage in codec.layout.stages)
    return " + ".join(stages)


def _loading(header: Header) -> str:
    label = header.model.label.replace("\\", "\\\\").replace('"', '\\"')
    return "\n".join(
        [
            "```python",
            "from transformers import AutoModelForCausalLM",
            "from pqkv_cli.runtime import attach, load",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{label}")',
            'attached = attach(model, load("pqkv.safetensors"))',
            "output = model.generate(**inputs, cache=attached.new_cache())",
            "```",
        ]
    )


def _results(rows: Sequence[Mapping[str, object]]) -> str:
    if not rows:
        return "Not measured yet: `pqkv eval` measures it."
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return _table([tuple(map(_escaped, columns)), *(tuple(_cell(row.get(column)) for column in columns) for row in rows)])


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else _escaped(str(value))


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, tuple("---" for _ in head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))


HEADER_FILE = "pqkv.json"
CARD_FILE = "README.md"


def write_derived(directory: Path | str, header: Header, rows: Sequence[Mapping[str, object]] = ()) -> tuple[Path, ...]:
    """Write ``pqkv.json`` and ``README.md`` for the artifact with this `header` (its hash filled in); return their paths.

    Raises
    ------
    ArtifactError
        If one cannot be written.
    """
    texts = {
        HEADER_FILE: header_text(header),
        CARD_FILE: model_card(header, rows),
    }
    paths = []
    for name, text in texts.items():
        paths.append(Path(directory) / name)
        write_text(paths[-1], text, ArtifactError)
    return tuple(paths)


def header_text(header: Header) -> str:
    """Return the text of ``pqkv.json``."""
    return json.dumps(header_document(header), indent=1, sort_keys=True) + "\n"
