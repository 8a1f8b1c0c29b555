"""Structures and constants of the C++ sources, as Python reads them: as the compiler lays them out, or not at all."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from pqkv_kernels.cpu import attention, centroid_sums, encode
from pqkv_kernels.cpu.build import SOURCE, find_compiler
from pqkv_kernels.cpu.structs import Struct, constant, constants, structure
from pqkv_kernels.errors import KernelError
from pqkv_kernels.format.layout import PAGE_TOKENS, SUPPORTED_NBITS, TRIED_PROTOTYPES

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")
USED = sorted(
    {
        found
        for module in (attention, centroid_sums, encode)
        for found in vars(module).values()
        if isinstance(found, type) and issubclass(found, Struct) and found is not Struct
    },
    key=lambda found: found.__name__,
)

GOOD = """#include <cstdint>
struct Hidden;
struct Inner { float x; int64_t y; };  // on one line

/* struct Outer { int64_t no; };
   is a comment */
struct Outer {
  Inner first, second;  // two of them; [B, 2]
  const float* a;
  const float *b, *c;  // stars belong to names
  float d;             /* a float, so that the next field is padded */ int64_t e;
  Hidden* h; uint8_t **bytes;
  const void*
      far;
  float last;
};
constexpr int kTokens = 64;  // constexpr int kTokens = 65;
constexpr int kDims[] = {1, 2, 16};
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return written(tmp_path, GOOD)


def written(folder: Path, text: str) -> Path:
    path = folder / "call.cpp"
    path.write_text(text, encoding="utf-8")
    return path


def checks(struct: type[Struct]) -> list[str]:
    """What a compiler must agree with: the size, and of every field where it lies and what it is."""
    name = struct.__name__
    said = [f"sizeof({name}) == {ctypes.sizeof(struct)}"]
    for field, kind in struct._fields_:
        said.append(f"offsetof({name}, {field}) == {getattr(struct, field).offset}")
        number = {ctypes.c_int64: "int64_t", ctypes.c_float: "float"}.get(kind, kind.__name__)
        is_one = f"std::is_same_v<decltype({name}::{field}), {number}>"
        said.append(f"std::is_pointer_v<decltype({name}::{field})>" if kind is ctypes.c_void_p else is_one)
    return said


def refused_checks(source: Path, said: list[str], folder: Path) -> list[str]:
    """Those of `said` that the compiler does not agree with."""
    asserts = [f'static_assert({check}, "check {i}.");' for i, check in enumerate(said)]
    program = folder / "checks.cpp"
    program.write_text("\n".join(["#include <cstddef>", "#include <type_traits>", f'#include "{source}"', *asserts]))
    command = [str(find_compiler()), "-std=c++17", "-w", "-fsyntax-only", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    refused = [check for i, check in enumerate(said) if f"check {i}." in done.stderr.replace(asserts[i], "")]
    assert (done.returncode == 0) == (not refused), done.stderr
    return refused


def test_every_call_is_among_them() -> None:
    names = "AttentionJob CentroidJob ExactJob Group NearestJob Part PartsJob PointsJob Side Tokens"
    assert [struct.__name__ for struct in USED] == names.split()


@needs_compiler
@pytest.mark.parametrize("struct", USED, ids=lambda struct: struct.__name__)
def test_the_compiler_lays_them_out_alike(struct: type[Struct], tmp_path: Path) -> None:
    assert refused_checks(struct._source, checks(struct), tmp_path) == []


@needs_compiler
def test_the_compiler_would_notice_another_order(good: Path, tmp_path: Path) -> None:
    said = checks(structure(good, "Inner"))
    assert refused_checks(good, said, tmp_path) == []
    assert refused_checks(good, [check.replace("== 8", "== 4") for check in said], tmp_path) == [
        "offsetof(Inner, y) == 4",
    ]


def test_a_structure_has_the_fields_of_the_source(good: Path) -> None:
    outer = structure(good, "Outer")
    names = "first second a b c d e h bytes far last"
    assert [name for name, _ in outer._fields_] == names.split() and outer.__name__ == "Outer"
    kinds = dict(outer._fields_)
    assert kinds["first"] is kinds["second"] is structure(good, "Inner")
    assert all(kinds[name] is ctypes.c_void_p for name in ("a", "b", "c", "h", "bytes", "far"))
    assert (kinds["d"], kinds["e"], kinds["last"]) == (ctypes.c_float, ctypes.c_int64, ctypes.c_float)
    assert outer.e.offset == outer.d.offset + 8 and ctypes.sizeof(outer) % 8 == 0
    assert structure(good, "Outer") is outer


@needs_compiler
def test_the_compiler_agrees_on_padding(good: Path, tmp_path: Path) -> None:
    assert refused_checks(good, checks(structure(good, "Outer")), tmp_path) == []


@pytest.mark.parametrize(
    ("body", "line", "found"),
    [
        ("double x;", 3, "double x"),
        ("int64_t a;\n  int32_t b;", 4, "int32_t b"),
        ("unsigned int x;", 3, "unsigned int x"),
        ("int64_t a, b[2];", 3, "int64_t a, b[2]"),
        ("float x = 1;", 3, "float x = 1"),
        ("int64_t bits : 3;", 3, "int64_t bits : 3"),
        ("float& x;", 3, "float& x"),
        ("std::vector<float> x;", 3, "std::vector<float> x"),
        ("int64_t (*call)(int64_t);", 3, "int64_t (*call)(int64_t)"),
        ("int64_t count() const;", 3, "int64_t count() const"),
        ("int64_t a;\n\n  int64_t count() const { return a; }", 5, "int64_t count() const { return a"),
        ("float x[2] = {1, 2};", 3, "float x[2] = {1, 2"),
        ("int64_t a;\n#ifdef WIDE\n  int64_t b;\n#endif", 4, "#ifdef WIDE int64_t b"),
        ("Later x;", 3, "Later x"),
        ("Call again;", 3, "Call again"),
        ("int64_t a;\n  float b, a;", 4, "float b, a"),
        ("static int64_t a;", 3, "static int64_t a"),
        ("int64_t a;\n  int64_t b", 4, "int64_t b"),
        ("int64_t;", 3, "int64_t"),
        ("int64_t a,;", 3, "int64_t a,"),
        ("public:\n  int64_t a;", 3, "public: int64_t a"),
        ("", 2, "struct Call {"),
    ],
)
def test_what_it_does_not_understand_is_named_with_its_line(body: str, line: int, found: str, tmp_path: Path) -> None:
    source = written(tmp_path, f"// one line\nstruct Call {{\n  {body}\n}};\nstruct Later {{ int64_t a; }};\n")
    with pytest.raises(KernelError) as refusal:
        structure(source, "Call")
    assert str(refusal.value).startswith(f"call.cpp:{line}: found {found!r}; expected ")


@pytest.mark.parametrize("text", ["struct Call { int64_t a; } call;", "struct Call { int64_t a;"])
def test_a_structure_must_end(text: str, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="call.cpp:1: .*expected '};' behind the last declaration"):
        structure(written(tmp_path, text), "Call")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("struct Other { int64_t a; };", 0),
        ("struct Call;", 0),
        ("struct Call : Base { int64_t a; };", 0),
        ("struct alignas(64) Call { int64_t a; };", 0),
        ("// struct Call { int64_t a; };", 0),
        ("#ifdef A\nstruct Call { int64_t a; };\n#else\nstruct Call { float a; };\n#endif", 2),
    ],
)
def test_there_must_be_one(text: str, count: int, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=rf"call.cpp has {count} structures 'struct Call \{{'; expected one"):
        structure(written(tmp_path, text), "Call")


def test_fields_are_filled_in_by_keyword(good: Path) -> None:
    inner, outer = structure(good, "Inner"), structure(good, "Outer")
    filled = outer(first=inner(x=1.5, y=2), second=inner(x=0, y=-1), d=1, e=True, last=2, c=64)
    assert (filled.first.x, filled.second.y, filled.e, filled.c, filled.a) == (1.5, -1, 1, 64, None)
    pair = (inner * 2)(inner(x=0, y=1), inner(x=0, y=2))
    assert [one.y for one in pair] == [1, 2]


def test_wrong_names_and_missing_fields_are_refused(good: Path) -> None:
    inner = structure(good, "Inner")
    with pytest.raises(KernelError, match=r"Inner was given unknown fields \['z'\] and lacks \['y'\]; give it .* call.cpp"):
        inner(x=1.0, z=2)
    with pytest.raises(TypeError):
        inner(1.0, 2)


def test_constants_are_read(good: Path) -> None:
    assert constant(good, "kTokens") == 64 and constants(good, "kDims") == (1, 2, 16)


@pytest.mark.parametrize(
    ("text", "defined", "read"),
    [
        ("constexpr int kOther = 1;", 0, 0),
        ("constexpr int kNumber = 4 * 16;", 1, 0),
        ("constexpr int64_t kNumber = 4;", 1, 0),
        ("const int kNumber = 4;", 1, 0),
        ("#ifdef A\nconstexpr int kNumber = 16;\n#else\nconstexpr int kNumber = 8;\n#endif", 2, 2),
        ("#ifdef A\nconstexpr int kNumber = 16;\n#else\nconstexpr int kNumber = kOther;\n#endif", 2, 1),
    ],
)
def test_constants_are_plain_and_stand_once(text: str, defined: int, read: int, tmp_path: Path) -> None:
    expected = f"call.cpp defines kNumber {defined} times, {read} of them as expected; expected it once, as in 'constexpr int"
    with pytest.raises(KernelError, match=expected):
        constant(written(tmp_path, text), "kNumber")


@pytest.mark.parametrize("value", ["[] = {}", "[] = {1, k}", "[2] = {1, 2}", " = 1"])
def test_lists_of_constants_are_plain(value: str, tmp_path: Path) -> None:
    with pytest.raises(
        KernelError, match=r"defines kNumbers 1 times, 0 of them .* 'constexpr int kNumbers\[\] = \{1, 2, 4\};'"
    ):
        constants(written(tmp_path, f"constexpr int kNumbers{value};"), "kNumbers")


def test_constants_of_the_format_are_those_of_the_loops() -> None:
    codes = SOURCE.with_name("codes.h")
    assert constant(codes, "kTokens") == PAGE_TOKENS
    assert 7 + constant(codes, "kHighBits") == max(SUPPORTED_NBITS)  # a code has bits 7 to 11, beside the lower seven
    assert encode.MOST_TOP_K >= TRIED_PROTOTYPES  # or prototypes are not searched by the loop


def test_blocks_and_nearest_are_served_from_one_on() -> None:
    for source, name in ((SOURCE.with_name("attention_job.h"), "kBlocks"), (encode.NEAREST_SOURCE, "kTopK")):
        served = constants(source, name)
        assert served == tuple(range(1, len(served) + 1))
