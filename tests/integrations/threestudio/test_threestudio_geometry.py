"""The hash grid for threestudio: what its config means, what is refused, and that it streams what chunks give."""

from __future__ import annotations

from typing import Any

import pytest
import threestudio_cases as cases
import torch
import torch.nn.functional as F
from torch import Tensor

from dreamfusion_fast.rendering.volume import chunked

ENCODING = {
    "otype": "HashGrid",
    "n_levels": 4,
    "n_features_per_level": 2,
    "log2_hashmap_size": 11,
    "base_resolution": 4,
    "per_level_scale": 1.7,
}
NETWORK = {"otype": "VanillaMLP", "activation": "ReLU", "output_activation": "none", "n_neurons": 16}
NETWORK["n_hidden_layers"] = 1  # type: ignore[assignment]


def make_geometry(**cfg: Any) -> Any:
    given = {"radius": 0.875, "pos_encoding_config": ENCODING, "mlp_network_config": NETWORK}
    torch.manual_seed(3)
    geometry = cases.threestudio.find(cases.HASH_GRID)({**given, **cfg})
    with torch.no_grad():
        geometry.field.table.mul_(3e3)
    return geometry


def make_renderer(geometry: Any, material: str = "no-material", **cfg: Any) -> Any:
    given = {"radius": 0.875, "num_samples_per_ray": 64, "randomized": False}
    parts = {"material": cases.threestudio.find(material)(), "background": cases.Sky()}
    return cases.threestudio.find(cases.RENDERER)({**given, **cfg}, geometry=geometry, **parts)


def test_it_streams_with_no_material_and_gives_what_chunks_give(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = cases.make_batch(7, dtype=torch.float32)
    chunks = 0
    evaluate = chunked.evaluate

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal chunks
        chunks += 1
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(chunked, "evaluate", counted)
    results = []
    for variance in (None, True):
        renderer = make_renderer(make_geometry(), return_z_variance=variance)
        renderer.update_step(0, 0)
        chunks = 0
        out = renderer(**batch)
        assert (chunks == 0) == (variance is None)
        (out["comp_rgb"].square().sum() + out["depth"].sum() + out["opacity"].sum()).backward()
        results.append((out, [*renderer.geometry.parameters(), renderer.background.weight]))
    (streamed, found), (whole, wanted) = results
    assert set(whole) - set(streamed) == {"z_variance"}
    for name, value in streamed.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-5)
    assert len(found) == 6
    for value, other in zip(found, wanted, strict=True):
        scale = float(other.grad.abs().max())
        assert scale > 0.0
        torch.testing.assert_close(value.grad / scale, other.grad / scale, rtol=1e-4, atol=1e-5)


def test_it_does_not_stream_for_what_a_field_alone_cannot_say() -> None:
    batch = cases.make_batch(4, dtype=torch.float32)
    renderer = make_renderer(make_geometry())
    assert "z_variance" not in renderer(**batch)
    renderer.material.cfg.color_activation = "tanh"
    out = renderer(**batch)
    assert "z_variance" in out
    assert float(out["comp_rgb_fg"].detach().min()) < 0.0
    renderer.material.cfg.color_activation = "sigmoid"
    renderer.cfg.return_samples = True
    assert renderer(**batch)["features"].shape[1] == 3
    renderer.eval()
    assert "z_variance" not in renderer(**batch)
    wide = make_renderer(make_geometry(n_feature_dims=5))
    wide.material.cfg.n_output_dims = 5
    wide.background.weight = torch.nn.Parameter(torch.randn(3, 5))
    assert wide(**batch)["comp_rgb"].shape[-1] == 5


def test_parameters_and_grids_are_held_once() -> None:
    renderer = make_renderer(make_geometry())
    renderer(**cases.make_batch(3, dtype=torch.float32))
    assert not list(renderer.parameters())
    assert all("field" not in name for name in renderer.state_dict())
    geometry = renderer.geometry
    assert len(list(geometry.network.parameters())) == 4
    assert sum(p.numel() for p in geometry.parameters()) == geometry.encoding.numel() + sum(
        p.numel() for p in geometry.network.parameters()
    )
    other = make_geometry()
    other.load_state_dict(geometry.state_dict())


def test_it_has_what_implicit_volume_returns() -> None:
    geometry = make_geometry(n_feature_dims=4)
    points = torch.rand(2, 7, 3) - 0.5
    points.requires_grad_(True)
    known = geometry(points, output_normal=True)
    assert {name: list(value.shape) for name, value in known.items()} == {
        "density": [2, 7, 1],
        "features": [2, 7, 4],
        "normal": [2, 7, 3],
        "shading_normal": [2, 7, 3],
    }
    torch.testing.assert_close(geometry.forward_density(points), known["density"])
    torch.testing.assert_close(geometry.export(points)["features"], known["features"])
    (slope,) = torch.autograd.grad(geometry.field.density(points.view(-1, 3)).sum(), points)
    torch.testing.assert_close(known["normal"], -F.normalize(slope, dim=-1), rtol=1e-3, atol=1e-4)
    field, deformation = geometry.forward_field(points)
    assert deformation is None
    assert bool(((geometry.forward_level(field, 0.5) < 0) == (field > 0.5)).all())
    torch.testing.assert_close(geometry.field(points.view(-1, 3)).color, known["features"].view(-1, 4)[:, :3].sigmoid())


@pytest.mark.parametrize(
    ("cfg", "raw"),
    [
        ({"density_bias": "blob_magic3d", "density_blob_scale": 7.0}, lambda r: 7.0 * (1.0 - r / 0.5)),
        (
            {"density_bias": "blob_dreamfusion", "density_activation": "exp", "density_blob_std": 0.3},
            lambda r: 10.0 * torch.exp(-0.5 * r**2 / 0.09),
        ),
        ({"density_bias": -1.5}, lambda r: torch.full_like(r, -1.5)),
        ({"density_bias": -1.5, "density_activation": "trunc_exp"}, lambda r: torch.full_like(r, -1.5)),
    ],
)
def test_the_initial_density_is_that_of_the_config(cfg: dict[str, Any], raw: Any) -> None:
    geometry = make_geometry(**cfg)
    with torch.no_grad():
        geometry.field.table.zero_()
        last = geometry.network[-1]
        last.weight.zero_()
        if "blob" in str(cfg["density_bias"]):
            last.bias.zero_()
    points = 1.7 * (torch.rand(113, 3) - 0.5)
    activation = F.softplus if cfg.get("density_activation") is None else torch.exp
    wanted = activation(raw(points.norm(dim=1, keepdim=True)))
    torch.testing.assert_close(geometry.forward_density(points), wanted, rtol=1e-5, atol=1e-6)


def test_the_grid_is_that_of_the_config() -> None:
    geometry = cases.threestudio.find(cases.HASH_GRID)({})
    config = geometry.field.config
    assert (config.levels, config.features, config.log2_rows) == (16, 2, 19)
    assert (config.base_resolution, config.finest_resolution) == (16, 4096)
    assert (config.hidden, config.hidden_layers, config.bound) == (64, 1, "box")
    smooth = make_geometry(pos_encoding_config={**ENCODING, "interpolation": "Smoothstep"})
    assert smooth.field.config.smoothstep


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"n_input_dims": 2}, "n_input_dims: got 2, want 3"),
        ({"n_feature_dims": 1}, "n_feature_dims: got 1, want 3 to 15"),
        ({"normal_type": "finite_difference"}, "normal_type: got 'finite_difference', want 'analytic' or null"),
        ({"density_activation": "relu"}, "density_activation: got 'relu', want softplus or exp or trunc_exp"),
        ({"density_bias": "blob_dreamfusion"}, "density_activation: got 'softplus', want exp or trunc_exp with"),
        ({"density_bias": "blob"}, "density_bias: got 'blob', want a number or blob_magic3d or blob_dreamfusion"),
        ({"pos_encoding_config": {**ENCODING, "otype": "ProgressiveBandHashGrid"}}, "want otype HashGrid"),
        ({"pos_encoding_config": {**ENCODING, "include_xyz": True}}, "pos_encoding_config: got 'include_xyz'"),
        ({"pos_encoding_config": {**ENCODING, "interpolation": "Nearest"}}, "want Linear or Smoothstep"),
        ({"pos_encoding_config": {"n_levels": 3}}, "pos_encoding_config: got 'no otype'"),
        ({"mlp_network_config": {**NETWORK, "otype": "SphereInitVanillaMLP"}}, "mlp_network_config.otype: got"),
        ({"mlp_network_config": {**NETWORK, "activation": "Sine"}}, "mlp_network_config.activation: got 'Sine'"),
        ({"mlp_network_config": {**NETWORK, "output_activation": "tanh"}}, "output_activation: got 'tanh', want none"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{cases.HASH_GRID}: .*") as caught:
        make_geometry(**cfg)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_normals_that_the_config_leaves_out_are_asked_for() -> None:
    with pytest.raises(ValueError, match="normal_type: got null, want 'analytic'"):
        make_geometry(normal_type=None)(torch.zeros(2, 3), output_normal=True)


def test_a_lit_material_gets_features_and_normals() -> None:
    class LitFeatures(cases.BaseMaterial):
        requires_normal = True

        def forward(self, features: Tensor, shading_normal: Tensor, light_positions: Tensor, **others: Any) -> Tensor:
            assert features.shape[0] == shading_normal.shape[0] == light_positions.shape[0]
            return torch.sigmoid(features) * (shading_normal[:, :1] + 1.0)

    renderer = make_renderer(make_geometry())
    renderer.set_material(LitFeatures())
    out = renderer(**cases.make_batch(4, dtype=torch.float32))
    loss = cases.stock_orientation_loss(out) + out["comp_rgb"].sum()
    loss.backward()
    assert renderer.geometry.encoding.grad.abs().max() > 0.0


@pytest.mark.gpu
def test_it_streams_on_a_gpu() -> None:
    results = []
    for device in ("cpu", "cuda"):
        renderer = make_renderer(make_geometry(mlp_dtype="float32").to(device)).to(device)
        renderer.background.to(device)
        renderer.estimator.set_occupied(torch.ones(32, 32, 32, dtype=torch.bool))
        batch = cases.make_batch(7, dtype=torch.float32)
        out = renderer(**{name: value.to(device) for name, value in batch.items()})
        assert "z_variance" not in out
        out["comp_rgb"].square().sum().backward()
        results.append(
            [out["comp_rgb"].detach().cpu(), out["depth"].detach().cpu(), renderer.geometry.encoding.grad.cpu()]
        )
    for value, other in zip(*results, strict=True):
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))
