"""What a kernel becomes on a GPU that is not here: compiled for sm_90 in a process of its own, its main loop counted.

Prints one JSON object: for every variant asked for, how many instructions the loop over pages has, how many of them are for the
integer unit, which takes half as many per cycle (`integers`), move data between lanes (`moves`) or to and from memory for want
of registers (`spills`), and registers. Arguments: JSON of the variants.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

TYPES = {
    **dict.fromkeys(("p_key_pages", "p_value_pages", "p_spans", "p_factors"), "*i64"),
    **dict.fromkeys(("p_pairs", "p_score_rows", "p_places", "p_few", "p_chosen"), "*i32"),
    **{f"p_{side}_{what}": "*i32" for side in ("key", "value") for what in ("parts", "rows", "entries")},
    **{
        "p_x": "*bf16",
        "p_centroids": "*fp16",
        "p_prototypes": "*fp16",
        "p_lines": "*fp16",
        "p_pages": "*u8",
        "softcap": "fp32",
    },
}
ENTRIES = ("p_key_entries", "p_value_entries")
ALIGNED = (
    "key_page_bytes",
    "value_page_bytes",
    "num_pairs",
    "num_scores",
    "num_tokens",
    "first_channel",
    "page_bytes",
    "tiles",
)
PROCESSES = min(4, os.cpu_count() or 1)  # that compile at a time, a gigabyte each
INTEGERS = set("PRMT LOP3 PLOP3 IADD3 VIADD SHF LEA ISETP FSETP SEL FSEL FMNMX IMNMX VIMNMX SGXT I2FP F2FP".split())
MOVES, SPILLS = {"SHFL", "STS", "LDS", "LDSM", "STSM"}, {"LDL", "STL"}


def compiled(kernel: Any, constants: dict[str, Any], num_warps: int, **launch: int) -> Any:
    """Compile for sm_90 with arguments as a launch describes them: pointers and round numbers are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pqkv_kernels.gpu.version import launch_options

    signature, known, types = {}, {}, dict(TYPES)
    if constants.get("WIDE"):
        types |= dict.fromkeys((*ENTRIES, "p_factors"), "*fp32")
    for i, name in enumerate(kernel.arg_names):
        default = "*fp32" if name.startswith("p_") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, default)
        if name.startswith("p_") or name in ALIGNED:
            known[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=known)
    options = launch_options(num_warps, **launch)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def counted(kernel: Any) -> dict[str, int]:
    """Count the instructions of the longest loop of a compiled kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        listing = _run(tools / "nvdisasm", "-c", binary)
        usage = _run(tools / "cuobjdump", "-res-usage", binary)
    places: dict[str, int] = {}
    names: list[str] = []
    loop: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = len(names)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\w+)", line):
            names.append(found[1])
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if back and len(names) - places.get(back[1], len(names)) > len(loop):
                loop = names[places[back[1]] :]
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    kinds = {"integers": INTEGERS, "moves": MOVES, "spills": SPILLS}
    found = {kind: sum(name in names for name in loop) for kind, names in kinds.items()}
    return {"instructions": len(loop), **found, "registers": int(registers[1])}


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def measure(variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Run this file on `variants` of a kernel: its module and name, constants, and those of its `launch_options`."""
    processes = min(len(variants), PROCESSES)
    shares = [dict(list(variants.items())[i::processes]) for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        found = {name: counts for share in pool.map(_measure, shares) for name, counts in share.items()}
    return {name: found[name] for name in variants}


def _measure(variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, json.dumps(variants)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    from pqkv_kernels.gpu.version import dot_width

    found = {}
    for name, variant in json.loads(sys.argv[1]).items():
        module, name_of_kernel = variant.pop("kernel").split(":")
        kernel = getattr(import_module(module), name_of_kernel)
        launch = {option: variant.pop(option) for option in ("num_warps", "num_stages", "max_registers") if option in variant}
        width = {"WIDTH": dot_width()} if "WIDTH" in kernel.arg_names else {}
        found[name] = counted(compiled(kernel, variant | width, **launch))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
