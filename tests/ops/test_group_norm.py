"""Group normalisation in parts: PyTorch on a CPU, kernels on a GPU and in Triton's interpreter, against the twin."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from group_norm_cases import Case, cases, run

import dreamfusion_fast
from dreamfusion_fast.ops import group_norm as module
from dreamfusion_fast.ops.group_norm import GroupNorm, group_norm_reference, input_gradient, normalise, statistics

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("case", cases(), ids=str)
def test_matches_the_twin(case: Case, device: torch.device) -> None:
    run(case, device)


def test_matches_the_twin_in_float64() -> None:
    run(Case(2, 6, 2, 7, 5, "float64", offset="images", residual=True, skip=True), torch.device("cpu"))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What went wrong in each case when Triton's interpreter ran the kernels."""
    places = [Path(dreamfusion_fast.__file__).parents[1], Path(__file__).parent]
    path = os.pathsep.join([*map(str, places), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    script = Path(__file__).with_name("group_norm_cases.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.parametrize("case", cases(interpreted=True), ids=str)
def test_kernels_match_the_twin_in_the_interpreter(case: Case, interpreted: dict[str, str]) -> None:
    assert interpreted.get(str(case)) is None


@pytest.mark.parametrize(("pixels", "tiles"), [(64 * 64, 1), (512 * 512, 4)])
def test_small_images_are_split_finer(pixels: int, tiles: int) -> None:
    per_program, programs = module._split(1, 128, pixels)
    assert per_program == tiles
    assert (programs - 1) * per_program * module._tile(128)[0] < pixels <= programs * per_program * module._tile(128)[0]


def test_the_twin_is_the_layer() -> None:
    layer = torch.nn.GroupNorm(2, 6, eps=1e-3).double()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    wanted = torch.nn.functional.silu(layer(x))
    torch.testing.assert_close(group_norm_reference(x, layer.weight, layer.bias, 2, 1e-3), wanted)


def test_wrong_arguments() -> None:
    weight, bias = torch.ones(6), torch.zeros(6)
    norm = GroupNorm(weight, bias, 2, 1e-5)
    x = torch.randn(2, 6, 3, 5).contiguous(memory_format=torch.channels_last)
    found = statistics(norm, x)
    with pytest.raises(ValueError, match="groups must divide the 6 channels, got 4"):
        GroupNorm(weight, bias, 4, 1e-5)
    with pytest.raises(ValueError, match=r"x must have shape \[n, 6, height, width\], got \[2, 4, 3, 5\]"):
        statistics(norm, x[:, :4])
    with pytest.raises(ValueError, match="x must be contiguous with channels last in memory"):
        statistics(norm, x.contiguous())
    with pytest.raises(ValueError, match=r"offset must have shape \[2, 6\], got \[3, 6\]"):
        statistics(norm, x, torch.zeros(3, 6))
    with pytest.raises(ValueError, match="total must be given with a residual"):
        statistics(norm, x, residual=x)
    with pytest.raises(TypeError, match=r"grad_y must be torch\.float32, got torch\.float64"):
        input_gradient(norm, x.double(), x, found)
    with pytest.raises(TypeError, match=r"x must be .* got torch\.int64"):
        normalise(norm, x.long(), found)
