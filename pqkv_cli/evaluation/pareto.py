"""Bits against loss: which methods nothing beats, as numbers. Knows records; measures nothing, draws nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

SCHEMA = "pqkv.pareto/1"

Record = Mapping[str, Any]
Point = dict[str, Any]


def pareto_document(records: Sequence[Record]) -> dict[str, Any]:
    """Return the numbers of the picture: one point per complete record, the unbeaten ones marked ``on_front``."""
    points = [_point(record) for record in records if record["status"] == "complete"]
    for point in points:
        point["on_front"] = not any(_beats(other, point) for other in points)
    return {
        "schema": SCHEMA,
        "x": "bits per channel, everything counted",
        "y": "KL divergence, bits per token, mean",
        "points": points,
    }


def _point(record: Record) -> Point:
    numbers = record["metrics"]
    return {
        "method": record["method"],
        "native_bits": record["native_bits"],
        "bits_per_channel": record["bits_per_channel"]["total"],
        "kl_bits": numbers["kl_bits"]["quantized"],
        "kl_bits_p99": numbers["kl_bits"]["p99"],
        "top1_agreement": numbers["top1_agreement"]["quantized"],
        "perplexity": numbers["perplexity"]["quantized"],
        "artifact_sha256": record["artifact_sha256"],
    }


def _beats(other: Point, point: Point) -> bool:
    """Return whether `other` is no worse in bits and loss, and better in one of them."""
    axes = ("bits_per_channel", "kl_bits")
    return all(other[a] <= point[a] for a in axes) and any(other[a] < point[a] for a in axes)
