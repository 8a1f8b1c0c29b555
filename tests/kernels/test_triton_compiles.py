"""The interpreter accepts what a compiler refuses: the kernels must compile for a GPU, with or without one at hand."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pqkv_kernels.triton_decode import merge_kernel, split_kernel
from pqkv_kernels.triton_choose import error_kernel, few_kernel
from pqkv_kernels.triton_codes import encode_kernel

def build(kernel, constants, types, warps):
    signature = {}
    for name in kernel.arg_names:
        default = "*fp32" if name.startswith("p_") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, default)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})

parts = dict(K_STAGES=1, K8=True, K4=True, K2=True, K1=False, V_STAGES=2, V8=False, V4=True, V2=False, V1=False)
types = {name: "*i64" for name in ("p_key_pages", "p_value_pages", "p_spans", "p_pairs")} | {"softcap": "fp32"}
types["p_score_rows"] = "*i32"
types |= {f"p_{side}_{what}": "*i32" for side in ("key", "value") for what in ("parts", "rows", "entries")}
for looked_up, turn in ((False, 1), (True, 0)):
    constants = dict(HAS_CAP=True, WIDE=False, PRECISION="tf32", D2=32, BP=32, BN=16, BT=32, **parts)
    build(split_kernel, dict(LOOKED_UP=looked_up, TURN=turn, **constants), types, 4)
build(merge_kernel, dict(D2=32, BP=32), {}, 2)
ints = ("p_places", "p_few", "p_chosen")
types = {name: "*i32" for name in ints} | {"p_x": "*bf16", "p_centroids": "*fp16", "p_prototypes": "*fp16", "p_pages": "*u8"}
part = dict(TURN=True, NBITS=7, DSUB=2, BD=2, D=64, BK=32)
shares = [dict(N0=7, N1=0, N2=0, N3=0), dict(N0=4, N1=2, N2=1, N3=0)]
for first, last, chosen, share in ((True, False, 0, 0), (False, True, 0, 1), (True, True, 1024, 0), (True, True, 1024, 1)):
    build(encode_kernel, dict(FIRST=first, LAST=last, CHOSEN=chosen, **part, **shares[share]), types, 4)
build(error_kernel, dict(M=32, K=1024, **part), types, 4)
build(few_kernel, dict(TURN=True, K=1024, BD=128, D=128, BK=32), types, 4)
print("compiled")
"""


def test_kernels_compile_for_sm_90() -> None:
    pytest.importorskip("triton.backends.nvidia", reason="this Triton has no NVIDIA backend")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
