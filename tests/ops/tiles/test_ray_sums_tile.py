"""Compositing in tiles against its twin, which takes all samples at once: any tile size, both passes, every column."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.ops.sample_head import SampleHead
from dreamfusion_fast.ops.tiles.ray_sums import (
    N_PREFIX,
    N_SUMS,
    OPTICAL_DEPTH,
    SampleTile,
    ray_sums_backward,
    ray_sums_forward,
    ray_sums_forward_reference,
    ray_sums_visible,
    ray_sums_visible_reference,
)

STEP = 0.07
# Rays of no, one, few and many samples (several warps' worth), so that cuts fall everywhere.
COUNTS = [0, 1, 5, 0, 70, 33, 113, 2, 64, 0]


def scene(
    device: torch.device,
    dtype: torch.dtype,
    shading: str = "lambertian",
    lights: bool = True,
    channels: int = 0,
    **options: object,
) -> dict[str, object]:
    """Random samples of `COUNTS` rays and the head that reads them."""
    n_rays, n = len(COUNTS), sum(COUNTS)
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    offsets = torch.tensor([0, *COUNTS]).cumsum(0).to(torch.int32)
    t = torch.cat([0.5 + STEP * torch.arange(count, dtype=torch.float64) for count in COUNTS])
    light = draw(n_rays, 3, scale=2.0) if lights else draw(3, scale=2.0)
    settings = dict(activation="softplus", blob_scale=3.0, blob_width=0.6, ball=True) | options
    return {
        "head": SampleHead(
            centre=(0.1, -0.2, 0.3),
            extent=(2.0, 1.5, 2.5),
            shading=shading,
            light=None if shading == "albedo" else light,
            **settings,  # type: ignore[arg-type]
        ),
        "offsets": offsets.to(device),
        "directions": torch.nn.functional.normalize(draw(n_rays, 3), dim=1),
        "t": t.to(device, dtype),
        "lengths": (draw(n).abs() + 0.5) * STEP,
        "positions": torch.rand(n, 3, generator=generator, dtype=torch.float64).to(device, dtype),
        "logits": draw(n, 4 + channels),
        "slopes": draw(n, 3),
    }


def tiles(s: dict, size: int, planes: bool) -> list[SampleTile]:
    """The samples cut into tiles, each with buffers of its own, poisoned beyond its samples."""
    offsets, n = s["offsets"].cpu(), s["t"].shape[0]
    result = []
    for first in range(0, max(n, 1), size):
        low = int((offsets[1:] <= first).sum())
        high = int((offsets[:-1] < first + size).sum())

        def cut(x: Tensor | None, first: int = first) -> Tensor | None:
            if x is None:
                return None
            part = x[first : first + size]
            whole = torch.full((size, *x.shape[1:]), math.nan, dtype=x.dtype, device=x.device)
            whole[: part.shape[0]] = part
            return whole.t().contiguous().t() if planes and whole.dim() == 2 else whole

        result.append(
            SampleTile(
                s["offsets"],
                torch.tensor([low, high], dtype=torch.int32, device=s["t"].device),
                s["directions"],
                cut(s["t"]),
                cut(s["lengths"]),
                cut(s["positions"]),
                cut(s["logits"]),
                cut(s["slopes"]),
                first,
                STEP,
            )
        )
    return result


def streamed(s: dict, size: int, grad_sums: Tensor, distortion: bool, planes: bool = False) -> tuple[Tensor, ...]:
    """Sums, and the gradients to logits and slopes, tile by tile."""
    parts, n = tiles(s, size, planes), s["t"].shape[0]
    sums = torch.zeros_like(grad_sums)
    prefix = s["t"].new_full((len(parts), N_PREFIX), math.nan)
    suffix = s["t"].new_full((len(parts) + 1, 1), math.nan)
    for tile, cut in zip(parts, prefix, strict=True):
        ray_sums_forward(s["head"], tile, sums, cut, distortion)
    gradients = []
    for k in reversed(range(len(parts))):
        to_logits = torch.full_like(parts[k].logits, math.nan)
        to_slopes = None if parts[k].slopes is None else torch.full_like(parts[k].slopes, math.nan)
        ray_sums_backward(
            s["head"], parts[k], sums, grad_sums, prefix[k], suffix[k + 1], suffix[k], to_logits, to_slopes, distortion
        )
        gradients.append((to_logits, to_slopes))
    to_logits, to_slopes = (
        None if column[0] is None else torch.cat(column[::-1])[:n] for column in zip(*gradients, strict=True)
    )
    return sums, to_logits, to_slopes


def twin(s: dict, grad_sums: Tensor, distortion: bool) -> tuple[Tensor, ...]:
    """Sums by the twin of both passes, and autograd's gradients in place of `ray_sums_backward_reference`."""
    s = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in s.items()}
    head = s["head"]
    if head.light is not None:
        s["head"] = replace(head, light=head.light.double())
    leaves = [x.requires_grad_() for x in (s["logits"], s["slopes"]) if x is not None]
    sums = ray_sums_forward_reference(**s, distortion=distortion)
    gradients = torch.autograd.grad(sums, leaves, grad_sums.double())
    return sums.detach(), *gradients, *([None] if s["slopes"] is None else [])


def assert_near(actual: Tensor | None, expected: Tensor | None, roundings: float) -> None:
    if expected is None:
        assert actual is None
        return
    scale = max(1.0, float(expected.abs().max()))
    error = float((actual.double() - expected).abs().max())
    assert error <= roundings * torch.finfo(actual.dtype).eps * scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1, 7, 32, 113, 1023])
@pytest.mark.parametrize("shading", ["albedo", "lambertian", "textureless"])
def test_any_tile_size_gives_what_the_twin_gives(
    shading: str, size: int, dtype: torch.dtype, device: torch.device
) -> None:
    s = scene(device, dtype, shading)
    grad_sums = torch.randn(len(COUNTS), N_SUMS, dtype=dtype, device=device)
    # Distortion sums up to 113^2 products.
    for actual, expected in zip(
        streamed(s, size, grad_sums, True, planes=device.type == "cuda"), twin(s, grad_sums, True), strict=True
    ):
        assert_near(actual, expected, 300)


@pytest.mark.parametrize("options", [{"activation": "exp", "blob_scale": 5.0}, {"blob_scale": 0.0}, {"ball": False}])
@pytest.mark.parametrize("lights", [True, False])
def test_every_kind_of_head(options: dict, lights: bool, device: torch.device) -> None:
    s = scene(device, torch.float64, "lambertian", lights, **options)
    s["logits"][3, 0] = 30.0  # exp saturates, softplus is linear
    grad_sums = torch.randn(len(COUNTS), N_SUMS, dtype=torch.float64, device=device)
    for actual, expected in zip(streamed(s, 50, grad_sums, True), twin(s, grad_sums, True), strict=True):
        # A normal divides by the length of a slope that may nearly cancel the blob's; exp multiplies by up to e^15.
        assert_near(actual, expected, 1e4 if "activation" in options else 2000)


def test_without_normals_and_distortion(device: torch.device) -> None:
    s = scene(device, torch.float64, "albedo") | {"slopes": None}
    grad_sums = torch.randn(len(COUNTS), N_SUMS, dtype=torch.float64, device=device)
    for actual, expected in zip(streamed(s, 50, grad_sums, False), twin(s, grad_sums, False), strict=True):
        assert_near(actual, expected, 300)


@pytest.mark.parametrize("size", [1, 50, 1023])
@pytest.mark.parametrize("channels", [1, 5])
def test_channels_beside_the_colour(channels: int, size: int, device: torch.device) -> None:
    s = scene(device, torch.float64, channels=channels)
    grad_sums = torch.randn(len(COUNTS), N_SUMS + channels, dtype=torch.float64, device=device)
    given, wanted = streamed(s, size, grad_sums, True, planes=device.type == "cuda"), twin(s, grad_sums, True)
    assert float(wanted[0][:, N_SUMS:].abs().max()) > 0.1
    for actual, expected in zip(given, wanted, strict=True):
        assert_near(actual, expected, 300)


def test_layouts_agree(device: torch.device) -> None:
    s = scene(device, torch.float32)
    grad_sums = torch.randn(len(COUNTS), N_SUMS, device=device)
    results = [streamed(s, 61, grad_sums, True, planes) for planes in (False, True)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_uniform_step_in_place_of_lengths(device: torch.device) -> None:
    s = scene(device, torch.float64)
    s["lengths"] = torch.full_like(s["lengths"], STEP)
    grad_sums = torch.randn(len(COUNTS), N_SUMS, dtype=torch.float64, device=device)
    expected = streamed(s, 61, grad_sums, True)
    for a, b in zip(streamed(s | {"lengths": None}, 61, grad_sums, True), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_an_opaque_sample_hides_the_rest_without_nan(device: torch.device) -> None:
    s = scene(device, torch.float32, blob_scale=0.0, ball=False)
    s["logits"][:, 0] = math.inf
    sums, to_logits, to_slopes = streamed(s, 40, torch.randn(len(COUNTS), N_SUMS, device=device), True)
    hit = torch.tensor(COUNTS) > 0
    assert (sums[hit.to(device), OPTICAL_DEPTH] == math.inf).all()
    assert sums[:, OPTICAL_DEPTH + 1 :].isfinite().all()
    assert to_slopes.isfinite().all()
    assert to_logits[:, 1:].isfinite().all()


@pytest.mark.parametrize("size", [1, 32, 50, 1023])
@pytest.mark.parametrize(("limit", "least"), [(1.5, 0.0), (1.5, 0.02), (math.inf, 0.02)])
def test_visible_samples(limit: float, least: float, size: int, device: torch.device) -> None:
    """Those that light reaches, a prefix of each ray, and of them those that hold back enough of it."""
    s = scene(device, torch.float64)
    depths = s["t"].new_zeros(len(COUNTS))
    counts = torch.zeros(len(COUNTS), dtype=torch.int32, device=device)
    kept = None if least == 0.0 else torch.full((sum(COUNTS),), 7, dtype=torch.uint8, device=device)
    for tile in tiles(s, size, planes=False):
        ray_sums_visible(s["head"], tile, depths, counts, limit, least, kept)
    names = ("head", "offsets", "lengths", "positions", "logits")
    everything, seen, flags = ray_sums_visible_reference(**{name: s[name] for name in names}, limit=limit, least=least)
    torch.testing.assert_close(depths, everything)
    assert torch.equal(counts, seen)
    assert kept is None or torch.equal(kept, flags)
    assert 0 < int(seen.sum()) < sum(COUNTS)
