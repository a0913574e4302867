"""The Transformer that makes planes: shapes, what it reads, and that a render trains all of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dreamfusion_fast.fields import TriplaneField, TriplaneFieldConfig
from dreamfusion_fast.networks.plane_transformer import PlaneTransformer, PlaneTransformerConfig
from dreamfusion_fast.rendering import RendererConfig, VolumeRenderer, orbit_cameras
from dreamfusion_fast.settings import SettingError

TINY = PlaneTransformerConfig(
    text_width=12, width=16, heads=2, blocks=2, tokens=3, patch=2, patch_features=4, features=4, code_width=5
)


def make(config: PlaneTransformerConfig = TINY) -> PlaneTransformer:
    return PlaneTransformer(config, torch.Generator().manual_seed(1))


def caption(batch: int = 2, length: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, length, 12), torch.randn(batch, 12)


def test_the_default_is_of_the_size_it_says() -> None:
    with torch.device("meta"):
        network = PlaneTransformer()
    assert network.config.resolution == 64
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(24.7e6, rel=0.01)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_shapes(batch: int) -> None:
    planes = make()(*caption(batch))
    assert planes.shape == (batch, 3, 6, 6, 4)
    assert planes.is_contiguous()
    assert planes.dtype == torch.float32


def test_rows_of_a_batch_do_not_mix_and_captions_matter() -> None:
    network, (states, pooled) = make(), caption()
    both = network(states, pooled)
    for row in range(2):
        torch.testing.assert_close(network(states[row : row + 1], pooled[row : row + 1])[0], both[row])
    spread = both.detach().std()
    assert (both[0] - both[1]).abs().max() > 1e-3 * spread
    assert (network(states, pooled.flip(0)) - both).abs().max() > 1e-3 * spread


def test_what_is_masked_is_not_read() -> None:
    network, (states, pooled) = make(), caption()
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    planes = network(states, pooled, mask)
    torch.testing.assert_close(planes[1:], network(states[1:, :4], pooled[1:]))
    torch.testing.assert_close(planes[:1], network(states[:1], pooled[:1]))
    changed = states.clone()
    changed[1, 4:] = 1e3
    assert torch.equal(network(changed, pooled, mask), planes)


def test_codes_tell_objects_apart_and_may_be_missing() -> None:
    network, (states, pooled) = make(), caption(1)
    states, pooled = states.expand(3, -1, -1), pooled.expand(3, -1)
    code = torch.randn(3, 5)
    code[2] = math.nan
    planes = network(states, pooled, code=code)
    assert (planes[0] - planes[1]).abs().max() > 1e-4 * planes.detach().std()
    torch.testing.assert_close(planes[2], network(states, pooled)[2])
    planes.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_patches_lie_where_their_tokens_do() -> None:
    """Rows of a plane are its second axis: token (row, column) is patch (row, column)."""
    network = make()
    patches = torch.arange(27.0).view(1, 27, 1).expand(1, 27, 16)
    laid = network._laid_out(patches).view(3, 4, 6, 6)
    expected = torch.arange(27.0).view(3, 3, 3).repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(laid, expected[:, None].expand(3, 4, 6, 6))


def test_planes_begin_of_variance_1_and_differ_from_place_to_place() -> None:
    network = make(PlaneTransformerConfig(width=64, heads=2, blocks=8, tokens=8))
    planes = network(torch.randn(4, 20, 384), torch.randn(4, 384)).detach()
    assert planes.var().item() == pytest.approx(1.0, rel=0.3)
    assert planes.var(dim=(2, 3)).mean().item() > 0.5


def test_reproducible() -> None:
    first, second = make(), make()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_render_of_a_batch_trains_all_of_it() -> None:
    network, field = make(), TriplaneField(TriplaneFieldConfig(resolution=6, features=4, hidden=8))
    states, pooled = caption()
    code = torch.randn(2, 5)
    code[1] = math.nan
    renderer = VolumeRenderer(
        field.with_planes(network(states, pooled, code=code)), None, RendererConfig(samples_across=16)
    )
    rays = orbit_cameras(2, elevation_deg=15.0).rays(8, 8)
    output = renderer.render(rays, extras={"scene": torch.arange(len(rays)) // 64})
    output.color.square().sum().backward()
    for name, parameter in network.named_parameters():
        # Of a softmax, a constant added to all keys is no change.
        assert parameter.grad is not None, name
        assert (parameter.grad.abs().max() > 0) or name.endswith("key.bias"), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": torch.zeros(2, 7, 11)}, r"states: got shape \[2, 7, 11\], want \[B, L, 12\]"),
        ({"pooled": torch.zeros(1, 12)}, r"pooled: got shape \[1, 12\], want \[2, 12\]"),
        ({"mask": torch.ones(2, 6, dtype=torch.bool)}, r"mask: got shape \[2, 6\], want \[2, 7\]"),
        ({"code": torch.zeros(2, 4)}, r"code: got shape \[2, 4\], want \[2, 5\]"),
    ],
)
def test_wrong_shapes(change: dict[str, Tensor], message: str) -> None:
    states, pooled = caption()
    with pytest.raises(ValueError, match=message):
        make()(**{"states": states, "pooled": pooled, **change})


def test_heads_have_to_divide_the_width() -> None:
    with pytest.raises(SettingError, match="width: got 384, want a multiple of heads = 7"):
        PlaneTransformerConfig(heads=7)
