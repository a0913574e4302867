"""Shading: the formula, its three kinds, lights."""

from __future__ import annotations

import pytest
import torch

from dreamfusion_fast.rendering import Shading, sample_lights, shade


def test_lambertian_formula() -> None:
    albedo = torch.tensor([[1.0, 0.5, 0.0]] * 3)
    normal = torch.tensor([[0.0, 1, 0], [0, -1, 0], [0.6, 0.8, 0]])
    positions = torch.tensor([[1.0, 0, 0]] * 3)
    lit = shade(albedo, normal, positions, torch.tensor([1.0, 5, 0]), "lambertian")
    cosines = torch.tensor([[1.0], [0.0], [0.8]])
    torch.testing.assert_close(lit, albedo * (0.1 + 0.9 * cosines))
    white = shade(albedo, normal, positions, torch.tensor([1.0, 5, 0]), Shading.TEXTURELESS, ambient=0.3, diffuse=0.5)
    torch.testing.assert_close(white, (0.3 + 0.5 * cosines).expand(3, 3))


def test_albedo_is_passed_through() -> None:
    albedo = torch.rand(4, 3)
    assert shade(albedo, None, torch.zeros(4, 3), None) is albedo


def test_one_light_per_sample() -> None:
    normal = torch.eye(3)
    lights = 3 * torch.eye(3)
    lit = shade(torch.ones(3, 3), normal, torch.zeros(3, 3), lights, "lambertian")
    torch.testing.assert_close(lit, torch.ones(3, 3))


def test_a_light_at_the_sample_is_finite() -> None:
    lit = shade(torch.ones(1, 3), torch.ones(1, 3), torch.zeros(1, 3), torch.zeros(3), "lambertian")
    torch.testing.assert_close(lit, torch.full((1, 3), 0.1))


def test_errors() -> None:
    with pytest.raises(ValueError, match="shading: got 'phong', want one of albedo, lambertian, textureless"):
        Shading.parse("phong")
    with pytest.raises(ValueError, match="shading lambertian: got no light"):
        shade(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 3), None, "lambertian")
    with pytest.raises(ValueError, match="mode: got 'sun'"):
        sample_lights(torch.ones(1, 3), torch.Generator(), mode="sun")
    with pytest.raises(ValueError, match=r"distance: got \(0.0, 1.0\)"):
        sample_lights(torch.ones(1, 3), torch.Generator(), distance=(0.0, 1.0))


@pytest.mark.parametrize("mode", ["camera", "uniform"])
def test_lights(device: torch.device, mode: str) -> None:
    cameras = torch.tensor([[0.0, 0, 3]], device=device).expand(2000, 3)
    lights, again = (sample_lights(cameras, torch.Generator().manual_seed(5), mode) for _ in range(2))
    assert torch.equal(lights, again)
    length = lights.norm(dim=1)
    assert float(length.min()) >= 0.8 - 1e-5
    assert float(length.max()) <= 1.5 + 1e-5
    towards_camera = float((lights[:, 2] > 0).float().mean())
    # N(camera, I) at distance 3 is behind the object with probability 0.0013; a uniform direction half of the time.
    assert (towards_camera > 0.99) if mode == "camera" else (0.45 < towards_camera < 0.55)
