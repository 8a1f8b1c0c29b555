"""Which number format a model computes in on a CPU, where nobody asks for one. Knows processors; loads no model.

A processor that has no instruction to multiply a narrow format converts every number: a product then takes many times as long
as in float32, and nothing shows why.
"""

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

# Instructions that multiply a format, by the names of torch and of Linux (x86: `flags`, ARM: `Features`).
_INSTRUCTIONS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16", "svebf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "fp16_arith", "asimdhp"),
}
_CPU_FACTS = Path("/proc/cpuinfo")
# A projection of a model with some billion parameters, and tokens of a short prompt.
_TOKENS, _CHANNELS = 32, 2048
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Precision:
    """The format to load weights in, None for the checkpoint's, and a sentence that says why, None where there is none."""

    dtype: torch.dtype | None
    reason: str | None


def automatic_precision(stored: torch.dtype | None, device: str) -> Precision:
    """Return what ``auto`` means for a checkpoint of the format `stored` on `device`: its own wherever that is quick.

    Parameters
    ----------
    stored
        The format in which the checkpoint asks to be loaded; None where it does not say.
    device
        Where the model computes. Only a CPU is asked what it can do.
    """
    if torch.device(device).type != "cpu" or stored not in _INSTRUCTIONS:
        return Precision(None, None)
    name = str(stored).removeprefix("torch.")
    has_instruction = multiplies_natively(stored)
    if not has_instruction:
        why = f"this processor has no instruction that multiplies {name}"
    else:
        own_ms, wide_ms = product_ms(stored), product_ms(torch.float32)
        why = f"a product takes {own_ms:.3g} ms in {name} and {wide_ms:.3g} ms in float32"
        if own_ms < wide_ms:
            return Precision(stored, f"computing in {name}, as the checkpoint is stored: on this processor {why}")
        why = f"on this processor {why}"
    return Precision(torch.float32, f"computing in float32 instead of the checkpoint's {name}: {why}; --dtype {name} keeps it")


def stored_format(config: Any) -> torch.dtype | None:
    """Return the format in which the checkpoint of `config` asks to be loaded; None where it does not say."""
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return found if isinstance(found, torch.dtype) else None


def is_quantized(config: Any) -> bool:
    """Return whether the weights of the checkpoint of `config` are quantized."""
    return any(getattr(each, "quantization_config", None) for each in (config, config.get_text_config()))


@cache
def multiplies_natively(dtype: torch.dtype) -> bool:
    """Return whether the processor has an instruction that multiplies numbers of `dtype`; False where nothing says so."""
    known = _capabilities()
    return any(name in known for name in _INSTRUCTIONS[dtype])


@cache
def product_ms(dtype: torch.dtype) -> float:
    """Return how long a matrix product as in a model takes in `dtype`: the quickest of a few."""
    tokens, weights = torch.ones(_TOKENS, _CHANNELS, dtype=dtype), torch.ones(_CHANNELS, _CHANNELS, dtype=dtype)
    seconds = []
    with torch.inference_mode():
        for _ in range(_REPEATS + 1):  # the first chooses how it is done
            started = time.perf_counter()
            torch.nn.functional.linear(tokens, weights)
            seconds.append(time.perf_counter() - started)
    return 1e3 * min(seconds[1:])


def _capabilities() -> frozenset[str]:
    # Newer versions of torch say it on every system; Linux says it itself.
    of_torch = getattr(torch.cpu, "get_capabilities", None)
    if of_torch is not None:
        return frozenset(name for name, value in of_torch().items() if value is True)
    return linux_flags(_CPU_FACTS.read_text(encoding="utf-8", errors="replace")) if _CPU_FACTS.is_file() else frozenset()


def linux_flags(text: str) -> frozenset[str]:
    """Return the instructions that `text`, as ``/proc/cpuinfo`` has it, lists for the first processor."""
    for line in text.splitlines():
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(words.split())
    return frozenset()
