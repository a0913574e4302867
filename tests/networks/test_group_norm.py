"""Group normalisation in parts: PyTorch on a CPU, kernels on a GPU and in Triton's interpreter, against the twin."""

from __future__ import annotations

import pytest
import torch
from group_norm_cases import LARGE, Case, cases, run
from interpreting import needs_triton, run_interpreted

from dreamfusion_fast.networks import group_norm as module
from dreamfusion_fast.networks.group_norm import (
    GroupNorm,
    group_norm_reference,
    measure,
    summed,
)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_matches_the_twin(case: Case, device: torch.device) -> None:
    run(case, device)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_images_match_the_twin(case: Case) -> None:
    run(case, torch.device("cuda"))


def test_matches_the_twin_in_float64() -> None:
    run(Case(2, 6, 2, 7, 5, "float64", offset="images", residual=True, skip=True), torch.device("cpu"))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """The faults in each case when Triton's interpreter ran the kernels."""
    return run_interpreted("networks/group_norm_cases.py")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("case", cases(interpreted=True), ids=str)
def test_kernels_match_the_twin_in_the_interpreter(case: Case, interpreted: dict[str, str]) -> None:
    assert interpreted.get(str(case)) is None


@pytest.mark.parametrize("pixels", [1, 64 * 64, 256 * 255, 512 * 512])
def test_images_are_split_into_enough_programs_and_no_more(pixels: int) -> None:
    (programs, _, _), settings = module._launch(torch.empty(1, 128, 1, pixels, device="meta"), 2048, sums=True)
    rows, per_program = settings["ROWS"], settings["TILES"]
    assert (rows, settings["COLS"]) == (16, 128)
    assert (programs - 1) * per_program * rows < pixels <= programs * per_program * rows
    assert 1 <= per_program <= module._TILES
    assert per_program == 1 or programs >= module._ENOUGH_PROGRAMS


def test_a_first_pixel_far_from_all_others() -> None:
    """Sums are taken of differences to the mean of the first pixels."""
    run(Case(1, 64, 4, 65, 33, outlier=True), torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_first_pixel_far_from_all_others_on_a_gpu(dtype: str) -> None:
    run(Case(1, 64, 4, 265, 133, dtype, outlier=True), torch.device("cuda"))


def test_the_twin_is_the_layer() -> None:
    layer = torch.nn.GroupNorm(2, 6, eps=1e-3).double()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    wanted = torch.nn.functional.silu(layer(x))
    torch.testing.assert_close(group_norm_reference(GroupNorm.of(layer, "silu"), x), wanted)


def test_wrong_arguments() -> None:
    weight, bias = torch.ones(6), torch.zeros(6)
    norm = GroupNorm(weight, bias, 2, 1e-5)
    x = torch.randn(2, 6, 3, 5).contiguous(memory_format=torch.channels_last)
    found = measure(norm, x)
    with pytest.raises(ValueError, match="groups must divide the 6 channels, got 4"):
        GroupNorm(weight, bias, 4, 1e-5)
    with pytest.raises(ValueError, match="activation must be one of none, silu, gelu, got 'relu'"):
        GroupNorm(weight, bias, 2, 1e-5, "relu")
    with pytest.raises(ValueError, match=r"x must have shape \[n, 6, height, width\], got \[2, 4, 3, 5\]"):
        measure(norm, x[:, :4])
    with pytest.raises(ValueError, match="x must be contiguous with channels last in memory"):
        measure(norm, x.contiguous())
    with pytest.raises(ValueError, match=r"offset must have shape \[2, 6\], got \[3, 6\]"):
        measure(norm, x, torch.zeros(3, 6))
    with pytest.raises(ValueError, match=r"offset must have shape \[6\], got \[2, 6\]"):
        summed(x, torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"residual must have shape \[2, 6, 3, 5\], got \[2, 6, 3, 4\]"):
        summed(x, None, x[..., :4])
    with pytest.raises(ValueError, match="padding must be at least 0, got -1"):
        summed(x, padding=-1)
    with pytest.raises(ValueError, match=r"modulation must have shape \[2, 12\], got \[2, 6\]"):
        found.normalised(torch.zeros(2, 6))
    with pytest.raises(ValueError, match="modulation must have channels next to each other in memory"):
        found.normalised(torch.zeros(2, 24)[:, ::2])
    with pytest.raises(TypeError, match=r"grad_y must be torch\.float32, got torch\.float64"):
        found.input_gradient(x.double())
    with pytest.raises(TypeError, match=r"x must be .* got torch\.int64"):
        measure(norm, x.long())
