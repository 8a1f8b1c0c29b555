"""How long it takes to load a stored prefix, beside reading its tokens: `python -m tools.prefix_speed ARTIFACT ...`.

Prints JSON: seconds on the clock and of the processor, the median of several; bytes; and, measured first in a process that has
loaded nothing before, the memory that loading takes at its peak.
"""

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pqkv_cli.hf.names import cache_argument
from pqkv_cli.models.load import load_model
from pqkv_cli.models.prefix import whole_ids
from pqkv_cli.models.resolve import resolve_model
from pqkv_cli.runtime import Attached, PrefixStore, attach, load


def read_and_stored(attached: Attached, store: PrefixStore, ids: Sequence[int], repeats: int) -> dict[str, Any]:
    """Let the model read `ids` and store them; return what that took."""
    cache, tokens = attached.new_cache(), torch.tensor([ids])

    def read() -> None:
        nonlocal cache
        cache = attached.new_cache()
        with torch.no_grad():
            attached.model(tokens, **cache_argument(attached.model, cache), use_cache=True, logits_to_keep=1)

    found = {f"read_{name}": value for name, value in _seconds(read, repeats).items()}
    found |= {f"save_{name}": value for name, value in _seconds(lambda: store.save(attached, cache, ids), 1).items()}
    stored = store.list()[0]
    blocks = sum(pages for _, pages in stored.header.blocks)
    return {**found, "tokens": len(ids), "bytes": stored.num_bytes, "own_bytes": stored.own_bytes, "pages": blocks}


def loaded(attached: Attached, store: PrefixStore, ids: Sequence[int], repeats: int) -> dict[str, Any]:
    """Load the stored prefix `ids`, one token before the end of a text, and return what that took."""
    text = [*ids, ids[0]]
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what others have freed must not hide what this takes
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    restored = store.longest_prefix(attached, text)
    peak = _resident_bytes("VmHWM") - before
    if restored.num_tokens != len(ids):
        raise SystemExit(f"{restored.num_tokens} tokens are stored in {store.directory}; expected {len(ids)}: store them first")
    size = store.find(store.list()[0].key).num_bytes
    found = _seconds(lambda: store.longest_prefix(attached, text), repeats)
    return {
        **{f"load_{name}": value for name, value in found.items()},
        "load_GB_per_s": round(size / found["wall_s"] / 1e9, 3),
        "load_peak_bytes": peak,
        "load_peak_over_file": round(peak / size, 3),
    }


def _seconds(act: Callable[[], object], repeats: int) -> dict[str, float]:
    """Return the median and the least of the clock's seconds, and the median of the processor's."""
    wall, processor = [], []
    for _ in range(repeats):
        started = time.perf_counter(), time.process_time()
        act()
        wall.append(time.perf_counter() - started[0])
        processor.append(time.process_time() - started[1])
    return {"wall_s": round(median(wall), 5), "least_s": round(min(wall), 5), "processor_s": round(median(processor), 5)}


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--model", required=True, help="its model")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--store", type=Path, required=True, help="where prefixes are stored")
    parser.add_argument("--tokens", type=int, default=7000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--save", action="store_true", help="read and store the tokens, and others with six sevenths of them")
    words = parser.parse_args()
    model, tokenizer = load_model(resolve_model(words.model), torch.float32, "cpu")
    ids = whole_ids(tokenizer, words.text.read_text(encoding="utf-8"))
    first, common = ids[: words.tokens], words.tokens * 6 // 7
    store = PrefixStore(words.store)
    with attach(model, load(words.artifact)) as attached:
        found: dict[str, Any]
        if words.save:
            second = [*first[:common], *ids[words.tokens : words.tokens + common // 12]]
            found = {"first": read_and_stored(attached, store, first, 1), "second": read_and_stored(attached, store, second, 1)}
        else:
            found = loaded(attached, store, first, words.repeats)
        found |= {"backend": attached.backend.name, "threads": torch.get_num_threads()}
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
