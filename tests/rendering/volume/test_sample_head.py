"""A field and `shade` agree with `sample_head_reference`, the twin of what the native core does to a sample."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from streaming_cases import LIGHT, make_field
from torch import Tensor

from dreamfusion_fast.ops.hash_grid import hash_grid_reference
from dreamfusion_fast.ops.sample_head import sample_head_reference
from dreamfusion_fast.rendering.shading import shade

BOX = (-1.0, -0.5, -2.0, 1.5, 0.5, 1.0)


@pytest.mark.parametrize("shading", ["albedo", "lambertian", "textureless"])
@pytest.mark.parametrize("bound", ["ball", "box"])
@pytest.mark.parametrize(("activation", "blob_scale"), [("softplus", None), ("exp", None), ("softplus", 0.0)])
def test_a_field_and_shade_agree_with_the_twin(
    activation: str, blob_scale: float | None, bound: str, shading: str
) -> None:
    field = make_field(aabb=BOX, density_activation=activation, blob_scale=blob_scale, bound=bound)
    source = field.tile_source()
    assert source is not None
    low, high = field.aabb[:3], field.aabb[3:]
    draws = torch.rand(300, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    unit = 1.2 * draws - 0.1  # some are outside
    positions = low + unit * (high - low)

    def logits_of(unit: Tensor) -> Tensor:
        x = hash_grid_reference(unit, source.table, field.level_offsets, field.resolutions, field.config.smoothstep)
        *inner, (weight, bias) = zip(source.weights, source.biases, strict=True)
        for inner_weight, inner_bias in inner:
            x = torch.relu(torch.nn.functional.linear(x, inner_weight, inner_bias))
        return torch.nn.functional.linear(x, weight, bias)

    leaf = unit.clone().requires_grad_()
    logits = logits_of(leaf)
    (slopes,) = torch.autograd.grad(logits[:, 0].sum(), leaf)
    head = replace(source.head, shading=shading, ambient=0.2, diffuse=0.7, light=LIGHT)
    density, color, normal = sample_head_reference(head, unit, logits, slopes, LIGHT)

    output = field(positions, with_normal=True)
    assert output.normal is not None
    shaded = shade(output.color, output.normal, positions, LIGHT, shading, ambient=0.2, diffuse=0.7)
    assert 0 < int((density == 0).sum()) < 300
    for actual, expected in ((output.density, density), (shaded, color), (output.normal, normal)):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(field.density(positions), density, rtol=1e-9, atol=1e-9)
