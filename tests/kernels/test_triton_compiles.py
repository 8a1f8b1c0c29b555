"""The interpreter accepts what a compiler refuses: the kernels must compile for a GPU, with or without one at hand.

And what decode attention becomes there is counted: a GPU reads codes faster than it can compute with them.
"""

import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
from machine_code import PROCESSES, measure

from pqkv_kernels.format.layout import PAGE_TOKENS
from pqkv_kernels.gpu.config import DecodeConfig
from pqkv_kernels.gpu.encode import FEW_STAGES
from pqkv_kernels.gpu.tables import device_tables
from pqkv_kernels.gpu.version import least_columns

HERE = Path(__file__).parent
KERNELS = {f"{name}_kernel" for name in ("split", "merge", "points", "lines", "encode", "few", "error")}
needs_compiler = pytest.importorskip("triton.backends.nvidia", reason="this Triton has no NVIDIA backend")


def test_whatever_is_launched_compiles_for_sm_90() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *sys.path])
    commands = [[sys.executable, HERE / "launches.py", str(share), str(PROCESSES)] for share in range(PROCESSES)]
    running = [subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=environment) for command in commands]
    launched = set()
    for process in running:
        names, errors = process.communicate()
        assert process.returncode == 0, errors[-2000:]
        launched |= set(names.split())
    assert launched == KERNELS


# instructions per channel of a page, keys and values of 128 channels, one warp and up to eight queries
QUERIES = 8
BUDGET = {
    "quality 4 b/ch": 5.8,
    "speed 4 b/ch": 10.0,
    "speed 2 b/ch": 6.9,
    "quality 4 b/ch, values from keys": 7.1,
    "speed 4 b/ch, values from keys": 12.6,
    "speed 2 b/ch, values from keys": 8.7,
}
# and per channel that is encoded, beside some 60 that bring it to code space
ENCODE_BUDGET = {
    "256 centroids of two channels": 310,
    "256 centroids of four channels": 170,
    "four of 1,024 prototypes": 220,
}


@pytest.mark.skipif(least_columns() > QUERIES, reason=f"this Triton multiplies {least_columns()} queries at least")
def test_decoding_fits_the_instructions_that_a_gpu_has_while_it_reads() -> None:
    """Where it fails after an update of Triton, see `gpu.version` and the hints of `page_kernels`: data move again."""
    import torch

    from pqkv_cli.benchmarks.shapes import FORMATS, SHAPES, random_tables

    config = DecodeConfig()
    variants = {}
    for name in FORMATS:
        keys, values = (device_tables(t, config.tables) for t in random_tables(SHAPES["llama-3-8b"], name, torch.device("cpu")))
        codes = {f"{side}_{what}": value for side, t in (("K", keys), ("V", values)) for what, value in _codes(t).items()}
        numbers = {"LOOKED_UP": False, "ROTATION": 1, "HAS_CAP": False, "WIDE": False, "ASM": True}
        shape = {
            "D2": 64,
            "BP": keys.num_planes,
            "CHUNK": 16,
            "BN": QUERIES,
            "kernel": "pqkv_kernels.gpu.attention_kernels:split_kernel",
            "num_warps": config.num_warps,
            "max_registers": config.max_registers,
        }
        variants[name] = {**codes, **numbers, **shape, "PREDICTED": 0}
    # Keys are looked up a second time, as values are.
    variants |= {f"{name}, values from keys": {**variants[name], "PREDICTED": 1} for name in FORMATS}
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
    kernel = {"kernel": "pqkv_kernels.gpu.encode_kernels:encode_kernel"}
    few = {"kernel": "pqkv_kernels.gpu.encode_kernels:few_kernel", "WIDE": False, "K": 1024, "D": 128, "BD": 128}
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
    return {"STAGES": tables.num_stages, "PARTS": tables.parts, "PAIRED": tables.paired}
