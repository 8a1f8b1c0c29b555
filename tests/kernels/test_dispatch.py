from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from kernel_cases import DEVICE, Case, inputs
from tests_support import key_tables, random_codebooks, value_tables

from pqkv_kernels import dispatch
from pqkv_kernels.cpu import backend as cpu_backend
from pqkv_kernels.cpu import build as native_build
from pqkv_kernels.cpu.backend import TorchBackend
from pqkv_kernels.dispatch import BACKENDS, BackendName, BackendRequest, Choice, attend_codes, choose_backend, encode_pages
from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import CodeLayout
from pqkv_kernels.format.rotary import PageAngles
from pqkv_kernels.format.tables import CodecTables
from pqkv_kernels.format.tokens import CodedTokens
from pqkv_kernels.gpu import backend as gpu_backend
from pqkv_kernels.gpu.config import TABLE, DecodeConfig, decode_config

CASE = Case("8", 64, 100, 2, "pages", True, None, "exact", 1, torch.float32)
CPU = torch.device("cpu")


def call(backend: str = "torch", **changes):
    given = inputs(CASE, heads=2)
    query = changes.pop("query", given.query)
    return attend_codes(backend, query, replace(given.tokens, **changes), 0.1)


def test_auto_says_what_it_chose_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "native_obstacle", lambda: None)
    assert choose_backend("auto", CPU) == Choice("native", "the device is cpu and a C++ compiler has built the kernel for it")
    monkeypatch.setattr(cpu_backend, "native_obstacle", lambda: "no C++ compiler was found")
    assert choose_backend("auto", CPU) == Choice("torch", "no C++ compiler was found")
    assert choose_backend("torch", CPU).reason == "asked for by name"


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch, generator) -> None:
    with pytest.raises(KernelError, match="backend is 'cuda'; expected one of auto, torch, native, triton"):
        choose_backend("cuda", CPU)
    layout = CodeLayout.uniform(16, 16, 4)  # one channel per code: no pairs
    cut = CodecTables(layout, random_codebooks(layout, 2, generator))
    with pytest.raises(KernelError, match="the values of coded layer 0 cut pairs of channels; choose torch"):
        choose_backend("triton", DEVICE, [(key_tables(generator), cut)])
    monkeypatch.setattr(gpu_backend, "find_spec", lambda name: None)
    with pytest.raises(KernelError, match="Triton is not installed"):
        choose_backend("triton", DEVICE)
    with pytest.raises(KernelError, match="the device is meta and the native backend runs on CPUs; choose torch"):
        choose_backend("native", torch.device("meta"))
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    native_build.native_library.cache_clear()
    with pytest.raises(KernelError, match=r"no C\+\+ compiler was found .*; install one; choose torch"):
        choose_backend("native", CPU)


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native_build, "CACHE", tmp_path)
    if native_build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text("int f() { return nonsense; }")
    with pytest.raises(KernelError, match=r"(?s)cannot compile wrong\.cpp: .*nonsense"):
        native_build.native_library(wrong)
    wrong.write_text('extern "C" int f() { return 7; }')
    assert native_build.native_library(wrong).f() == 7
    built = list(tmp_path.glob("wrong-*.so"))
    assert len(built) == 1 and [p.name for p in tmp_path.iterdir() if p.is_dir()] == []
    stamp = built[0].stat().st_mtime_ns
    native_build.native_library.cache_clear()
    native_build.native_library(wrong)
    assert built[0].stat().st_mtime_ns == stamp  # loaded, not built again


def test_a_changed_header_is_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native_build, "CACHE", tmp_path)
    if native_build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "answer.cpp"
    source.write_text('#include "answer.h"\nextern "C" int f() { return kAnswer; }')
    for answer in (7, 8):
        (tmp_path / "answer.h").write_text(f"constexpr int kAnswer = {answer};")
        native_build.native_library.cache_clear()
        assert native_build.native_library(source).f() == answer


def test_every_backend_has_a_name_that_can_be_asked_for() -> None:
    assert set(BACKENDS) == set(get_args(BackendName)) == set(get_args(BackendRequest)) - {"auto"}
    assert list(BACKENDS)[-1] == "torch"  # which runs everywhere, so that `auto` always ends


class Counted(TorchBackend):
    """A backend that somebody adds: torch, which counts its calls."""

    merit = "it counts"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def encode(self, x, tables, angles):
        self.calls.append("encode")
        return super().encode(x, tables, angles)

    def attend_codes(self, query, tokens, scaling, softcap):
        self.calls.append("attend_codes")
        return super().attend_codes(query, tokens, scaling, softcap)


def test_a_new_backend_is_a_class_and_a_row(monkeypatch: pytest.MonkeyPatch, generator) -> None:
    counted = Counted()
    monkeypatch.setattr(dispatch, "BACKENDS", {"counted": counted, **BACKENDS})
    assert choose_backend("auto", CPU) == Choice("counted", "the device is cpu and it counts")
    monkeypatch.setattr(counted, "obstacle", lambda device, codecs: "its fingers are busy")
    monkeypatch.setattr(cpu_backend, "native_obstacle", lambda: "no C++ compiler was found")
    assert choose_backend("auto", CPU) == Choice("torch", "its fingers are busy; no C++ compiler was found")
    given, tables = inputs(CASE, heads=2), value_tables(generator)
    found = attend_codes("counted", given.query, given.tokens, 0.1)
    for a, b in zip(found, call(), strict=True):
        torch.testing.assert_close(a, b)
    pages = encode_pages("counted", torch.zeros(1, 2, 64, 16), tables)
    assert pages.shape == (1, 1, 2, tables.layout.page_bytes) and counted.calls == ["attend_codes", "encode"]


def test_choosing_for_a_cpu_imports_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_backend, "import_module", lambda name: pytest.fail(f"imported {name}"))
    choose_backend("auto", CPU)


def test_subspaces_that_cut_pairs_still_attend(generator) -> None:
    layout = CodeLayout.uniform(64, 64, 4)
    odd = CodecTables(layout, random_codebooks(layout, 2, generator)).to(DEVICE)
    given = inputs(CASE, heads=2)
    pages = [torch.randint(0, 256, (2, n, 2, layout.page_bytes), dtype=torch.uint8, device=DEVICE) for n in (1, 1)]
    whole = [torch.cat(pages, 1)]
    answers = [
        attend_codes("torch", given.query, CodedTokens(blocks, blocks, odd, odd, given.tokens.spans), 0.1)
        for blocks in (pages, whole)
    ]
    for a, b in zip(*answers, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"query": torch.zeros(2, 4, 1, 32)}, "queries have shape [2, 4, 1, 32]; expected [B, a multiple of 2, Tq, 64]"),
        ({"query": torch.zeros(2, 3, 1, 64)}, "expected [B, a multiple of 2, Tq, 64]"),
        ({"query": torch.zeros(2, 4, 1, 64).long()}, "expected a float dtype"),
        ({"spans": torch.zeros(2).long()}, "spans have shape [2] and dtype torch.int64"),
        ({"spans": torch.zeros(2, 2)}, "expected [2, 2] torch.int64"),
        ({"key_pages": [torch.zeros(2, 2, 2, 7, dtype=torch.uint8)]}, "expected equal B, P, Hkv in every page block"),
        ({"angles": None}, "need the angles of their positions; none were given"),
        ({"angles": (torch.zeros(2, 5, 32), torch.zeros(2, 5, 32))}, "angles have shape [2, 5, 32]; expected [2, 128, 32]"),
    ],
)
def test_what_does_not_fit_is_named(backend: str, changes: dict, phrase: str) -> None:
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in changes.items()}
    with pytest.raises(KernelError) as caught:
        call(backend, **moved)
    assert phrase in str(caught.value)


def test_pages_of_another_layout_type_or_device_are_refused() -> None:
    given = inputs(CASE, heads=2)
    for change, phrase in (
        (lambda t: t[..., :-8], "key pages have shape"),
        (lambda t: t.to(torch.int16), "torch.uint8"),
        (lambda t: t.to("meta"), "arguments lie on"),
    ):
        with pytest.raises(KernelError, match=phrase):
            call(key_pages=[change(block) for block in given.tokens.key_pages])


def test_an_empty_batch_and_an_empty_cache_are_answered() -> None:
    given = inputs(CASE, heads=2)
    none = [block[:, :0] for block in given.tokens.key_pages]
    angles = given.angles.pages(0, 0)
    for backend in ("torch", "triton"):
        out, lse = call(backend, key_pages=none, value_pages=none, angles=angles)
        assert not out.any() and bool((lse == -torch.inf).all())
        rows = {"query": given.query[:0], "spans": given.tokens.spans[:0], "angles": PageAngles(*_no_rows(given.angles))}
        key_pages, value_pages = ([pages[:0]] for pages in given.pages)
        out, lse = call(backend, key_pages=key_pages, value_pages=value_pages, **rows)
        assert out.shape == (0, 4, 1, 64) and lse.shape == (0, 4, 1)


def _no_rows(angles: PageAngles):
    return tuple(t[:0] for t in angles.base), angles.step


def test_configs_are_data_and_checked() -> None:
    assert decode_config("NVIDIA H200", 128).num_warps == 1
    assert all(decode_config("unknown", dim) for dim in (64, 128, 256, 512)) and TABLE[-1][0] == ""
    for wrong, phrase in (
        ({"max_registers": 255}, "max_registers is 255"),
        ({"num_warps": 3}, "num_warps is 3"),
        ({"programs_per_processor": 0}, "at least 1"),
        ({"tables": "int4"}, "tables are 'int4'"),
    ):
        with pytest.raises(KernelError, match=phrase):
            DecodeConfig(**wrong)


@pytest.mark.parametrize("make", [key_tables, value_tables])
def test_encoding_refuses_what_does_not_fit(make, generator) -> None:
    tables = make(generator).to(DEVICE)
    for backend in ("torch", "triton"):
        with pytest.raises(KernelError, match="expected"):
            encode_pages(backend, torch.zeros(1, 2, 63, 16, device=DEVICE), tables)
