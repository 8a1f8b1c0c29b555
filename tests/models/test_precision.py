"""What dtype `auto` means on a CPU: the checkpoint's format only where the processor multiplies it, and is quicker with it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma3Config, LlamaConfig

from pqkv_cli.models import precision
from pqkv_cli.models.precision import Precision, automatic_precision, is_quantized, linux_flags, stored_format

HALVES = (torch.bfloat16, torch.float16)
X86 = "processor : 0\nmodel name\t: some: name\nflags\t\t: fpu avx2 {} ssse3\n\nprocessor : 1\nflags\t\t: never read\n"
ARM = "processor : 0\nFeatures\t: fp asimd {} crc32\n"


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def processor(monkeypatch: pytest.MonkeyPatch, is_native: bool, half_ms: float = 1.0, float_ms: float = 2.0) -> None:
    monkeypatch.setattr(precision, "multiplies_natively", lambda dtype: is_native)
    monkeypatch.setattr(precision, "product_ms", lambda dtype: half_ms if dtype in HALVES else float_ms)


@pytest.mark.parametrize("stored", HALVES)
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
@pytest.mark.parametrize(
    ("is_native", "half_ms", "is_kept", "reason"),
    [
        (False, 0.1, False, "this processor has no instruction that multiplies {}; --dtype {} keeps it"),
        (True, 4.0, False, "on this processor a product takes 4 ms in {} and 2 ms in float32; --dtype {} keeps it"),
        (True, 2.0, False, "on this processor a product takes 2 ms in {} and 2 ms in float32; --dtype {} keeps it"),
        (True, 1.5, True, "on this processor a product takes 1.5 ms in {} and 2 ms in float32"),
    ],
)
def test_a_half_is_kept_where_it_is_quicker(
    stored: torch.dtype,
    device: str,
    is_native: bool,
    half_ms: float,
    is_kept: bool,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor(monkeypatch, is_native, half_ms)
    found = automatic_precision(stored, device)
    assert found.dtype == (stored if is_kept else torch.float32)
    chosen = "{}, as the checkpoint is stored" if is_kept else "float32 instead of the checkpoint's {}"
    assert found.reason == f"computing in {chosen}: {reason}".replace("{}", name(stored))


@pytest.mark.parametrize(
    ("stored", "device"),
    [
        (torch.float32, "cpu"),
        (torch.float64, "cpu"),
        (None, "cpu"),
        *((half, kind) for half in HALVES for kind in ("cuda:1", "mps")),
    ],
)
def test_elsewhere_nothing_is_asked_nor_said(stored: torch.dtype | None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(dtype: torch.dtype) -> Any:
        raise AssertionError("the processor was asked")

    monkeypatch.setattr(precision, "multiplies_natively", never)
    assert automatic_precision(stored, device) == Precision(None, None)


@pytest.mark.parametrize(
    ("text", "natively"),
    [
        (X86.format("f16c avx512f"), ()),
        (X86.format("avx512_bf16"), (torch.bfloat16,)),
        (X86.format("amx_bf16 amx_tile"), (torch.bfloat16,)),
        (X86.format("avx512_fp16"), (torch.float16,)),
        (X86.format("amx_fp16 amx_bf16"), HALVES),
        (ARM.format("fphp asimdhp"), (torch.float16,)),
        (ARM.format("asimdhp bf16 svebf16"), HALVES),
        ("", ()),
        ("no colon here", ()),
    ],
)
@pytest.mark.parametrize("says", ["Linux", "torch"])
def test_instructions_are_found(
    says: str, text: str, natively: tuple[torch.dtype, ...], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = linux_flags(text)
    assert "never" not in flags
    if says == "Linux":  # versions of torch that do not say it
        monkeypatch.setattr(torch, "cpu", SimpleNamespace())
        monkeypatch.setattr(precision, "_CPU_FACTS", tmp_path / "cpuinfo")
        (tmp_path / "cpuinfo").write_text(text)
    else:
        more = {"avx512_bf16_of_another_kind": True, "sve_max_length": 256, "architecture": "any", "amx_tile": False}
        names = {flag.replace("asimdhp", "fp16_arith").replace("svebf16", "sve_bf16"): True for flag in flags}
        monkeypatch.setattr(torch, "cpu", SimpleNamespace(get_capabilities=lambda: more | names))
    assert tuple(half for half in HALVES if precision.multiplies_natively.__wrapped__(half)) == natively


def test_where_nobody_says_it_nothing_is_native(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cpu", SimpleNamespace())
    monkeypatch.setattr(precision, "_CPU_FACTS", tmp_path / "absent")
    assert not any(precision.multiplies_natively.__wrapped__(half) for half in HALVES)


def test_torch_knows_this_processor_by_the_same_names() -> None:
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if found.get("architecture") != "x86_64":
        pytest.skip("only some versions of torch, on x86-64, name these instructions")
    assert {"amx_bf16", "avx512_bf16", "amx_fp16", "avx512_fp16"} <= found.keys()


def test_a_product_takes_its_time() -> None:
    assert 0 < precision.product_ms(torch.float32) < 10_000


def test_what_a_checkpoint_says() -> None:
    assert stored_format(LlamaConfig(dtype="bfloat16")) == torch.bfloat16
    assert stored_format(LlamaConfig()) is None
    assert stored_format(Gemma3Config(text_config={"dtype": "float16"})) == torch.float16
    quantized = LlamaConfig(quantization_config={"quant_method": "torchao"})
    assert (is_quantized(quantized), is_quantized(LlamaConfig())) == (True, False)
