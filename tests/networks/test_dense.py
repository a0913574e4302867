"""The dense layers on a CPU against their twins in float64, with the rounding of float32 and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.networks import dense
from dreamfusion_fast.networks.dense import DenseConv, DenseGroupNorm, DenseLinear
from dreamfusion_fast.networks.group_norm import Activation

pytestmark = pytest.mark.skipif(not dense.dense_serves(), reason="the CPU core was not compiled for AVX2 and FMA")

EPS = torch.finfo(torch.float32).eps


def assert_rounded(found: Tensor, expected: Tensor, terms: int) -> None:
    """Equal up to what summing `terms` products of standard normal numbers in float32 loses, per element."""
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert found.shape == expected.shape
    # Errors of a sum walk at random: sqrt(terms) roundings of a sum of size sqrt(terms), 5 sigma.
    assert bool(((found.double() - expected).abs() < 2 * EPS * terms).all())


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 7, 8, 11, 48, 101])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 16), (7, 32), (192, 48)])
@pytest.mark.parametrize("extra", ["", "bias", "bias, residual", "residual in place"])
def test_linear(rows: int, inputs: int, outputs: int, extra: str) -> None:
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if "bias" in extra else None
    residual = torch.randn(rows, outputs) if "residual" in extra else None
    wide = [None if tensor is None else tensor.double() for tensor in (bias, residual)]
    expected = dense.linear_reference(x.double(), weight.double(), *wide)
    out = residual if "place" in extra else None
    found = dense.linear(x, DenseLinear(weight, bias), residual, out)
    assert_rounded(found, expected, inputs + 2)
    assert out is None or found is out


@pytest.mark.parametrize("size", [(1, 2, 2), (2, 2, 6), (3, 10, 4), (1, 32, 32)])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 16), (40, 48), (448, 16)])
@pytest.mark.parametrize("extra", ["", "bias, residual", "residual in place"])
def test_conv3x3(size: tuple[int, int, int], inputs: int, outputs: int, extra: str) -> None:
    x, weight = torch.randn(*size, inputs), torch.randn(outputs, inputs, 3, 3)
    bias = torch.randn(outputs) if "bias" in extra else None
    residual = torch.randn(*size, outputs) if "residual" in extra else None
    wide = [None if tensor is None else tensor.double() for tensor in (bias, residual)]
    expected = dense.conv3x3_reference(x.double(), weight.double(), *wide)
    out = residual if "place" in extra else None
    found = dense.conv3x3(x, DenseConv(weight, bias), residual, out)
    assert_rounded(found, expected, 9 * inputs + 2)
    assert out is None or found is out


def test_convolution_rounds_no_worse_than_the_direct_sum() -> None:
    """Winograd's transforms of larger tiles lose digits; those of 2x2 outputs do not."""
    x, weight = torch.randn(2, 16, 16, 128), torch.randn(128, 128, 3, 3)
    exact = dense.conv3x3_reference(x.double(), weight.double())
    direct = dense.conv3x3_reference(x, weight)
    found = dense.conv3x3(x, DenseConv(weight))
    assert (found - exact).square().mean() < 1.5 * (direct - exact).square().mean()


@pytest.mark.parametrize("shape", [(1, 2, 8), (2, 33, 48), (3, 8, 8, 224), (2, 40, 320)])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("modulated", [False, True])
def test_group_norm(shape: tuple[int, ...], activation: Activation, modulated: bool) -> None:
    channels = shape[-1]
    x = 3 * torch.randn(shape) + torch.randn(channels)
    norm = DenseGroupNorm(torch.randn(channels), torch.randn(channels), 8, 1e-5, activation)
    modulation = torch.randn(shape[0], 2 * channels) if modulated else None
    expected = dense.group_norm_reference(x.double(), norm, None if modulation is None else modulation.double())
    found = dense.group_norm(x, norm, modulation)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)


def test_group_norm_of_a_small_spread_about_a_large_mean() -> None:
    """The variance is that of differences to the mean, not a difference of large sums of squares."""
    x = (1000 + torch.randn(2, 100, 16, dtype=torch.float64)).float()
    norm = DenseGroupNorm(torch.ones(16), torch.zeros(16), 2, 1e-5, "none")
    found = dense.group_norm(x, norm)
    expected = dense.group_norm_reference(x.double(), norm)
    # What is left is the rounding of x - mean, half a unit in the last place of 1000.
    torch.testing.assert_close(found.double(), expected, atol=4e-4, rtol=0)


def test_silu_far_out() -> None:
    """SiLU where exp overflows and vanishes; a mean of 0 and a variance of 1 by construction."""
    norm = DenseGroupNorm(torch.full((8,), 1.0), torch.tensor([-200.0, -90, -20, -1, 0, 1, 90, 200]), 1, 0.0, "silu")
    x = torch.tensor([[-1.0] * 8, [1.0] * 8])[None]
    found, expected = dense.group_norm(x, norm), dense.group_norm_reference(x.double(), norm)
    torch.testing.assert_close(found.double(), expected, atol=1e-30, rtol=4e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(value: float) -> None:
    x = torch.randn(1, 4, 4, 8)
    x[0, 1, 1, 3] = value
    norm = DenseGroupNorm(torch.ones(8), torch.zeros(8), 2, 1e-5, "silu")
    assert not dense.group_norm(x, norm).isfinite().all()
    assert not dense.conv3x3(x, DenseConv(torch.randn(16, 8, 3, 3))).isfinite().all()
    assert not dense.linear(x, DenseLinear(torch.randn(16, 8))).isfinite().all()


def test_threads_change_no_bit() -> None:
    x = torch.randn(2, 16, 16, 64)
    conv, linear = DenseConv(torch.randn(32, 64, 3, 3)), DenseLinear(torch.randn(32, 64))
    norm = DenseGroupNorm(torch.randn(64), torch.randn(64), 8, 1e-5, "silu")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([dense.conv3x3(x, conv), dense.linear(x, linear), dense.group_norm(x, norm)])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(others, results[0], strict=True))


NORM = (torch.ones(8), torch.ones(8))


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "outputs must be a multiple of 16, got 12", lambda: DenseLinear(torch.ones(12, 8))),
        (TypeError, "weight must be torch.float32", lambda: DenseLinear(torch.ones(16, 8).double())),
        (ValueError, "bias must have shape", lambda: DenseLinear(torch.ones(16, 8), torch.ones(8))),
        (ValueError, "inputs must be a multiple of 8, got 12", lambda: DenseConv(torch.ones(16, 12, 3, 3))),
        (ValueError, "weight must have shape", lambda: DenseConv(torch.ones(16, 8, 1, 1))),
        (ValueError, "weight must be on the CPU", lambda: DenseConv(torch.ones(16, 8, 3, 3, device="meta"))),
        (ValueError, "activation must be silu or none, got 'gelu'", lambda: DenseGroupNorm(*NORM, 2, 1e-5, "gelu")),
        (ValueError, "groups must divide the 8 channels, got 3", lambda: DenseGroupNorm(*NORM, 3, 1e-5, "silu")),
        (ValueError, "x must have shape", lambda: dense.linear(torch.ones(2, 9), DenseLinear(torch.ones(16, 8)))),
        (ValueError, "contiguous", lambda: dense.linear(torch.ones(8, 2).t(), DenseLinear(torch.ones(16, 8)))),
        (
            ValueError,
            "height of x must be a multiple of 2, got 3",
            lambda: dense.conv3x3(torch.ones(1, 3, 4, 8), DenseConv(torch.ones(16, 8, 3, 3))),
        ),
        (
            ValueError,
            "modulation must have shape",
            lambda: dense.group_norm(
                torch.ones(1, 4, 8), DenseGroupNorm(*NORM, 2, 1e-5, "silu"), modulation=torch.ones(1, 8)
            ),
        ),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, make: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        make()


def test_output_must_not_be_the_input() -> None:
    x = torch.ones(4, 16)
    with pytest.raises(ValueError, match="out must not be x"):
        dense.linear(x, DenseLinear(torch.ones(16, 16)), out=x)
