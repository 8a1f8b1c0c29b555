"""The interpreter accepts what a compiler refuses: the kernels must compile for a GPU, with or without one at hand.

And what decode attention becomes there is counted: a GPU reads codes faster than it can compute with them.
"""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from subprocess import PIPE

import pytest
from machine_code import PROCESSES, measure

from pqkv_kernels.device_tables import device_tables
from pqkv_kernels.kernel_config import DecodeConfig, TableKind
from pqkv_kernels.layout import PAGE_TOKENS
from pqkv_kernels.triton_encode import FEW_STAGES
from pqkv_kernels.triton_version import least_columns

HERE = Path(__file__).parent
SCRIPT = """
import sys

from machine_code import compiled
from pqkv_kernels.triton_choose import error_kernel, few_kernel
from pqkv_kernels.triton_codes import encode_kernel
from pqkv_kernels.triton_decode import split_kernel
from pqkv_kernels.triton_encode import FEW_STAGES
from pqkv_kernels.triton_lines import lines_kernel
from pqkv_kernels.triton_merge import merge_kernel
from pqkv_kernels.triton_points import points_kernel

plan = []


def planned(*kernel, **launch):
    plan.append((kernel, launch))


codes = dict(K_STAGES=1, K_PARTS=21, K_PAIRED=False, V_STAGES=2, V_PARTS=8 << 10 | 8, V_PAIRED=True)
codes |= dict(K_NIBBLES=0, V_NIBBLES=0)
nibbles = dict(K_STAGES=2, K_PARTS=8 << 10 | 8, K_PAIRED=False, K_NIBBLES=1, V_STAGES=1, V_PARTS=8, V_PAIRED=True, V_NIBBLES=2)
for looked_up, turn, queries, warps in ((False, 1, 64, 4), (False, 2, 16, 1), (True, 0, 16, 1)):
    for wide, in_bytes in ((0, 0), (1, 0), (0, 1)):
        if wide and queries == 64:
            continue
        numbers = dict(WIDE=bool(wide), BYTES=bool(in_bytes), ASM=True)
        shape = dict(HAS_CAP=True, WIDTH=4, D2=24, BP=32, CHUNK=16, BN=queries)
        for kind in (codes, nibbles) if in_bytes else (codes,):
            planned(split_kernel, dict(LOOKED_UP=looked_up, TURN=turn, **shape, **numbers, **kind), warps)
for in_bytes in (0, 1):
    planned(merge_kernel, dict(D2=32, BP=32, COLUMNS=32, BS=16, NIBBLES=in_bytes), 4)
part = dict(K=128, LINES=128, CHUNK=64, D=64, WIDTH=4)
shares = [dict(N0=7, N1=0, N2=0, N3=0), dict(N0=4, N1=2, N2=1, N3=0)]
for last, chosen, share, dim in ((False, 0, 0, 2), (True, 0, 1, 8), (True, 1024, 1, 3)):
    planned(encode_kernel, dict(LAST=last, CHOSEN=chosen, DSUB=dim, **part, **shares[share]), 1)
planned(error_kernel, dict(CHOSEN=1024, DSUB=2, **part), 1)
for wide in (False, True):
    planned(few_kernel, dict(WIDE=wide, K=1024, D=80, BD=128), 4, num_stages=FEW_STAGES)
for turn in (False, True):
    planned(points_kernel, dict(TURN=turn, D=80, BD=32), 4)
for size, dim in ((2, 1), (256, 6)):
    planned(lines_kernel, dict(K=size, DSUB=dim, BD=8, BK=64), 4)
few = dict(HAS_CAP=False, WIDE=False, BYTES=False, ASM=True, WIDTH=4, D2=32, BP=32, CHUNK=16, BN=16, LOOKED_UP=False, TURN=1)
ones = dict.fromkeys(("num_heads", "heads", "num_queries", "num_pages", "width", "columns", "rows", "num_splits"), 1)
planned(split_kernel, dict(**few, **codes, **ones), 1)  # what is one is a constant to the compiler
planned(encode_kernel, dict(LAST=True, CHOSEN=0, DSUB=2, heads=1, tiles=1, page_bytes=1, **part, **shares[0]), 1)
planned(error_kernel, dict(CHOSEN=16, DSUB=2, heads=1, tiles=1, tried=1, **part), 1)
planned(merge_kernel, dict(D2=32, BP=32, COLUMNS=32, BS=16, NIBBLES=1, heads=1, num_queries=1, num_splits=1), 4)
share, shares = map(int, sys.argv[1:])
for kernel, launch in plan[share::shares]:
    compiled(*kernel, **launch)
print("compiled")
"""
needs_compiler = pytest.importorskip("triton.backends.nvidia", reason="this Triton has no NVIDIA backend")


def test_kernels_compile_for_sm_90() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *environment.get("PYTHONPATH", "").split(os.pathsep)])
    commands = [[sys.executable, "-c", SCRIPT, str(share), str(PROCESSES)] for share in range(PROCESSES)]
    running = [subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=environment) for command in commands]
    for output, errors in [process.communicate() for process in running]:
        assert output.strip() == "compiled", errors[-2000:]


# instructions per channel of a page, keys and values of 128 channels, one warp and up to eight queries
QUERIES = 8
BUDGET = {
    "quality 4 b/ch, float16": 5.8,
    "speed 4 b/ch, float16": 10.0,
    "speed 2 b/ch, float16": 6.9,
    "quality 4 b/ch, int8": 7.2,
    "speed 4 b/ch, int8": 6.4,
    "speed 2 b/ch, int8": 6.0,
}
# and per channel that is encoded, beside some 60 that bring it to code space
ENCODE_BUDGET = {
    "256 centroids of two channels": 310,
    "256 centroids of four channels": 170,
    "four of 1,024 prototypes": 220,
}


@pytest.mark.skipif(least_columns() > QUERIES, reason=f"this Triton multiplies {least_columns()} queries at least")
def test_decoding_fits_the_instructions_that_a_gpu_has_while_it_reads() -> None:
    """Where it fails after an update of Triton, see `triton_version` and the hints of `triton_planes`: data move again."""
    import torch

    from pqkv_cli.evaluation.shapes import FORMATS, SHAPES, random_tables

    config = DecodeConfig()
    variants = {}
    for name, in_bytes in product(FORMATS, (False, True)):
        kind: TableKind = "int8" if in_bytes else "float16"
        keys, values = (device_tables(t, kind) for t in random_tables(SHAPES["llama-3-8b"], name, torch.device("cpu")))
        codes = {f"{side}_{what}": value for side, t in (("K", keys), ("V", values)) for what, value in _codes(t).items()}
        numbers = {"LOOKED_UP": False, "TURN": 1, "HAS_CAP": False, "WIDE": False, "BYTES": in_bytes, "ASM": True}
        shape = {
            "D2": 64,
            "BP": keys.num_planes,
            "CHUNK": 16,
            "BN": QUERIES,
            "kernel": "pqkv_kernels.triton_decode:split_kernel",
            "num_warps": config.num_warps,
            "max_registers": config.max_registers,
        }
        variants[f"{name}, {kind}"] = {**codes, **numbers, **shape}
    for name, found in measure(variants).items():
        per_channel = found["instructions"] * 32 / (2 * PAGE_TOKENS * 128)
        print(f"{name}: {per_channel:.2f} instructions per channel, {found}")
        assert per_channel <= BUDGET[name], (name, found)
        assert found["moves"] <= 120 and found["spills"] <= 80 and found["registers"] <= 168, (name, found)


def test_encoding_a_prompt_is_little_beside_computing_it() -> None:
    """Of eight billion parameters, with 65,536 channels per token: some 12,000 instructions' time of a lane for each."""
    parts = {"256 centroids of two channels": 2, "256 centroids of four channels": 4}
    shares = {"N0": 4, "N1": 4, "N2": 0, "N3": 0}
    shape = {"K": 256, "LINES": 256, "CHUNK": 64, "D": 128, "LAST": True, "CHOSEN": 0, "num_warps": 1}
    kernel = {"kernel": "pqkv_kernels.triton_codes:encode_kernel"}
    few = {"kernel": "pqkv_kernels.triton_choose:few_kernel", "WIDE": False, "K": 1024, "D": 128, "BD": 128}
    variants = {name: {**shape, **shares, **kernel, "DSUB": dim} for name, dim in parts.items()}
    variants["four of 1,024 prototypes"] = {**few, "num_warps": 4, "num_stages": FEW_STAGES}
    for name, found in measure(variants).items():
        # a round of a part is of 32 points, one for each lane; of prototypes, of 16 and 64 points, two lanes for each
        rounds = 1 / parts[name] if name in parts else 1024 / 16 * 2 / 128
        per_channel = found["instructions"] * rounds
        print(f"{name}: {per_channel:.0f} instructions per channel, {found}")
        assert per_channel <= ENCODE_BUDGET[name], (name, found)
        assert found["moves"] <= 30 and found["spills"] == 0, (name, found)


def _codes(tables) -> dict[str, int]:
    return {"STAGES": tables.num_stages, "PARTS": tables.parts, "PAIRED": tables.paired, "NIBBLES": tables.nibbles}
