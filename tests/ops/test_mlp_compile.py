"""The fused MLP's kernels compile, without a GPU, for the GPUs they are meant for: the interpreter cannot tell."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreting import needs_triton

from dreamfusion_fast.ops import _mlp_launch
from dreamfusion_fast.ops._mlp_torch import Network

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    needs_triton,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

# What one program may have on the smallest of the GPUs with tensor cores that Triton serves (8.6, 8.9, 12.0).
SHARED_BYTES = 99 * 1024
COMPILER_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
DEFAULT, DEEP, WIDE = [32, 64, 64, 4], [32, 64, 64, 64, 4], [32, 128, 128, 4]


def compiled(kernel: str, capability: int, sizes: list[int], precision: str, **constants: Any) -> Any:
    """A kernel as the launcher would have it compiled for feature-major buffers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(_mlp_launch._kernels(), f"{kernel}_kernel")
    weights = [torch.empty(b, a, device="meta") for a, b in pairwise(sizes)]
    biases = [torch.empty(size, device="meta") for size in sizes[1:]]
    network = Network(weights, biases, "relu", precision)
    settings = _mlp_launch._settings(kernel, network, True, _mlp_launch.tuning(kernel, network))
    options = {name: settings.pop(name) for name in COMPILER_OPTIONS}
    constants = {**settings, **constants}
    for layer in range(len(weights), _mlp_launch.MAX_HIDDEN_LAYERS + 1):
        constants |= {f"weight_{layer}": None, f"bias_{layer}": None}
    operand, gradient = ("fp32", "fp32") if precision == "float32" else ("fp16", "bf16")
    pointers = {"count": "*i32", "x": f"*{operand}", "v": f"*{operand}", "u": f"*{gradient}", "grad_x": f"*{gradient}"}
    signature, divisible = {}, {}
    for index, name in enumerate(function.arg_names):
        if name.endswith("_row"):
            constants[name] = 1
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "i32" if name in ("n", "partials_stride") or name.endswith("_col") else "*fp32"
        signature[name] = pointers.get(name, signature[name])
        divisible[(index,)] = [["tt.divisibility", 16]]
    positions = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=positions, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "sizes", "precision"),
    [
        (80, DEFAULT, "float16"),
        (90, DEFAULT, "float16"),
        (86, DEEP, "float16"),
        (90, WIDE, "float16"),
        (80, DEFAULT, "float32"),
    ],
)
def test_kernels_compile_and_fit(capability: int, sizes: list[int], precision: str) -> None:
    """Forward with v, and the launches of backward with a gradient of v."""
    kernels = [compiled("forward", capability, sizes, precision, INPUT_GRADIENT=True)]
    counts = tuple(a * b for a, b in pairwise(sizes))
    for gradients, second_sums, to_x in _mlp_launch._plan(counts, second=True, to_x=True)[:: len(sizes) - 2]:
        constants: dict[str, Any] = {"GRADIENTS": gradients, "SECOND_SUMS": second_sums, "GRAD_X": to_x}
        constants["SECOND"] = second_sums != 0
        if not to_x:
            constants |= {"grad_x": None, "gx_col": None}
        if not second_sums:
            constants |= {"u": None, "u_col": None}
        kernels.append(compiled("backward", capability, sizes, precision, **constants))
    for kernel in kernels:
        assert 0 < kernel.metadata.shared <= SHARED_BYTES
        ptx = kernel.asm["ptx"]
        assert ("mma" in ptx) == (precision == "float16")
        # Samples that lie side by side are read 16 bytes at a time.
        assert "ld.global.v4.b32" in ptx
