"""What a cache weighs by the memory of the process: 32K tokens of four layers of Llama 3 8B at 4 bits per channel.

The C library keeps freed blocks for the next ones that are asked for, about as much again after a long prompt was read; here
it is told to give blocks of more than 128 KiB back at once, as `docs/quickstart.md` advises where memory is counted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STATM = Path("/proc/self/statm")
SCRIPT = """
import gc, json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
from transformers import LlamaConfig
from test_memory import DIM, HEADS, blank_pages, blank_tables
from pqkv_cli.cache import encoder
from pqkv_cli.cache.cache import quantized_cache
from pqkv_cli.rates import key_layout, rate_layout
from pqkv_cli.specs import CacheSpec

LAYERS, TOKENS, CHUNK = 4, 32768, 4096
torch.set_num_threads(1)
# Zeros instead of codes: what is coded does not change what it weighs.
encoder.encode_pages = lambda backend, *args: blank_pages(*args)
config = LlamaConfig(num_hidden_layers=LAYERS, num_attention_heads=32, num_key_value_heads=HEADS, hidden_size=4096)
tables = {"keys": blank_tables(key_layout(4, DIM)), "values": blank_tables(rate_layout(4, DIM))}
states = torch.ones(1, HEADS, CHUNK, DIM, dtype=torch.bfloat16)


def filled(tokens):
    cache = quantized_cache(config, [tables] * LAYERS, CacheSpec(), [None] * LAYERS)
    for start in range(0, tokens, CHUNK):
        cache.begin_step(torch.arange(start, start + CHUNK)[None], None)
        for index in range(LAYERS):
            cache.update(states, states, index)
    return cache


def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


filled(2 * CHUNK)  # what the first call loads and keeps
before = resident()
cache = filled(TOKENS)
grown = resident() - before
dense = LAYERS * 2 * HEADS * DIM * 2 * TOKENS
print(json.dumps({"grown": grown, "tensors": cache.num_bytes().total, "dense": dense}))
"""


@pytest.mark.skipif(not STATM.exists(), reason="this system has no /proc/self/statm")
def test_the_process_grows_by_what_the_tensors_hold() -> None:
    here = str(Path(__file__).parent)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", SCRIPT, here]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tensors"] <= 0.27 * found["dense"]
    assert abs(found["grown"] - found["tensors"]) <= 0.1 * found["tensors"], found
    assert found["grown"] <= 1.1 * 0.27 * found["dense"]
