"""The renderer for threestudio: images, gradients and keys are those of a dense render, for chunks of any size."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
from threestudio_cases import RADIUS, Blob, dense, leaves, make, make_batch, stock_orientation_loss
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from dreamfusion_fast.integrations.threestudio.stand_ins import orientation_stand_ins

IMAGES = ("comp_rgb", "comp_rgb_fg", "comp_rgb_bg", "opacity", "depth", "z_variance")
ONE = 10**6
CHUNKS = [ONE, 97, 1]
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def loss_of(out: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """Each value with a weight of its own."""
    parts = []
    for k, name in enumerate(names):
        ramp = torch.linspace(0.3, 1.7, out[name].numel(), dtype=out[name].dtype)
        parts.append((k + 1) * (out[name].flatten() * ramp).mean())
    return torch.stack(parts).sum()


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs, retain_graph=True))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("material", ["lit", "flat"])
def test_images_and_gradients_are_those_of_a_dense_render(material: str, chunk: int) -> None:
    renderer = make(material, train_chunk_size=chunk, return_comp_normal=True)
    batch = make_batch()
    if material == "lit":
        batch["ambient"] = torch.tensor(0.2, dtype=torch.float64)  # of the batch, passed on as it is
    inputs = [*batch.values(), *leaves(renderer)]
    wanted_inputs = [value.requires_grad_(True) for value in inputs if material == "lit" or value is not inputs[2]]
    names = IMAGES + (("comp_normal",) if material == "lit" else ())
    random.seed(3)
    expected = dense(renderer, **batch)
    random.seed(3)
    out = renderer(**batch)
    for name in names:
        assert out[name].shape == expected[name].shape
        torch.testing.assert_close(out[name], expected[name], **EXACT)
    found = gradients(loss_of(out, names), wanted_inputs)
    for value, wanted in zip(found, gradients(loss_of(expected, names), wanted_inputs), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-9)
    assert float(expected["opacity"].max()) > 0.9
    assert float(expected["opacity"].min()) < 0.5


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_orientation_loss_as_systems_write_it_has_its_value_and_gradient(chunk: int) -> None:
    renderer, batch = make(train_chunk_size=chunk), make_batch()
    with torch.no_grad():  # normals that point away from the camera, here and there
        renderer.geometry.first.mul_(3.0)
        renderer.geometry.second.mul_(2.0)
    expected, out = dense(renderer, **batch), renderer(**batch)
    found = stock_orientation_loss(out)
    assert out["normal"].shape == (1, 3)
    assert float(expected["orientation"].detach()) > 1e-4
    torch.testing.assert_close(found, expected["orientation"], **EXACT)
    inputs = [renderer.geometry.first, renderer.geometry.second]
    wanted = gradients(expected["orientation"], inputs)
    for value, other in zip(gradients(found, inputs), wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-8, atol=1e-12)
    assert any(float(value.abs().max()) > 1e-4 for value in wanted)


@pytest.mark.parametrize("value", [0.0, 1e-30, 0.7, 1e6, float("nan")])
def test_stand_ins_give_any_loss_and_its_gradient(value: float) -> None:
    """Of 0, too: all normals face the camera."""
    loss = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    out = orientation_stand_ins(loss * 2.0) | {"opacity": torch.tensor([[0.5], [0.0], [1.0]])}
    found = stock_orientation_loss(out)
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=0.0, equal_nan=True)
    (slope,) = torch.autograd.grad(found, loss)
    wanted = torch.tensor(value and 1.0, dtype=torch.float64) if value == value else torch.tensor(value).double()
    torch.testing.assert_close(slope, wanted, equal_nan=True)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_samples_are_handed_out_when_asked_for(chunk: int) -> None:
    renderer, batch = make(train_chunk_size=chunk, return_samples=True, return_normal_perturb=True), make_batch()
    out, expected = renderer(**batch), dense(renderer, **batch)
    count = out["weights"].shape[0]
    shapes = {name: list(value.shape) for name, value in out.items() if name not in IMAGES}
    assert shapes == {
        "weights": [count, 1],
        "t_points": [count, 1],
        "t_intervals": [count, 1],
        "t_dirs": [count, 3],
        "ray_indices": [count],
        "points": [count, 3],
        "density": [count, 1],
        "features": [count, 3],
        "roughness": [count, 1],
        "scale": [],
        "normal": [count, 3],
        "shading_normal": [count, 3],
        "normal_perturb": [count, 3],
    }
    assert out["ray_indices"].dtype == torch.int64
    sums = torch.zeros(expected["opacity"].numel(), dtype=torch.float64).index_add(
        0, out["ray_indices"], out["weights"][:, 0]
    )
    torch.testing.assert_close(sums, expected["opacity"].flatten(), **EXACT)
    torch.testing.assert_close(out["t_intervals"], torch.full_like(out["t_points"], renderer.render_step_size))
    rows = batch["rays_o"].reshape(-1, 3)[out["ray_indices"]]
    torch.testing.assert_close(out["points"], rows + out["t_dirs"] * out["t_points"], **EXACT)
    found = stock_orientation_loss(out)
    torch.testing.assert_close(found, expected["orientation"], **EXACT)
    inputs = [renderer.geometry.first, renderer.geometry.second]
    smooth = (out["normal"] - out["normal_perturb"]).abs().mean()
    assert all(value.isfinite().all() for value in gradients(smooth, inputs))
    for value, other in zip(gradients(found, inputs), gradients(expected["orientation"], inputs), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-8, atol=1e-12)


def test_keys_are_the_stock_ones() -> None:
    batch = make_batch()
    lit, flat = make("lit"), make("flat")
    assert set(lit(**batch)) == {*IMAGES, "weights", "normal", "t_dirs"}
    assert set(flat(**batch)) == {*IMAGES}
    assert set(make("flat", return_z_variance=False)(**batch)) == {*IMAGES} - {"z_variance"}
    assert set(lit.eval()(**batch)) == {*IMAGES, "comp_normal"}
    assert set(flat.eval()(**batch)) == {*IMAGES}


def test_evaluation_goes_in_chunks_and_keeps_no_graph() -> None:
    renderer, batch = make(eval_chunk_size=50), make_batch()
    renderer.eval()
    with torch.no_grad():
        out = renderer(**batch, ambient=1e3)  # which only training passes on
    random.seed(0)
    expected = dense(renderer, **batch)
    assert not any(value.requires_grad for value in out.values())
    assert renderer.geometry.asked > 50  # the dense render
    renderer.geometry.asked = 0
    with torch.no_grad():
        renderer(**batch)
    assert 0 < renderer.geometry.asked <= 50
    torch.testing.assert_close(out["comp_normal"], expected["comp_normal"], **EXACT)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_choice_of_the_material_is_one_for_all_chunks(chunk: int) -> None:
    renderer, batch = make(train_chunk_size=chunk), make_batch()
    seen = set()
    for seed in range(6):
        random.seed(seed)
        expected = dense(renderer, **batch)
        after = random.random()
        random.seed(seed)
        out = renderer(**batch)
        assert random.random() == after  # as if it had been asked once
        torch.testing.assert_close(out["comp_rgb"], expected["comp_rgb"], **EXACT)
        random.seed(seed + 100)
        state = random.getstate()
        found = gradients(loss_of(out, IMAGES), leaves(renderer))
        assert random.getstate() == state
        for value, other in zip(found, gradients(loss_of(expected, IMAGES), leaves(renderer)), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-8, atol=1e-9)
        random.seed(seed)
        seen.add(random.random() < 0.5)
    assert seen == {True, False}


def test_noise_is_repeated_when_a_chunk_is_recomputed() -> None:
    drawn: list[float] = []

    class Noisy(Blob):
        def forward(self, points: Tensor, output_normal: bool = False) -> dict[str, Tensor]:
            known = super().forward(points, output_normal)
            noise = torch.rand_like(known["features"])
            drawn.append(float(noise[0, 0]))
            return known | {"features": known["features"] * noise}

    renderer, batch = make("flat", train_chunk_size=60), make_batch()
    renderer.set_geometry(Noisy({"radius": RADIUS}))
    second = renderer.geometry.second

    def red() -> Tensor:
        torch.manual_seed(7)
        return renderer(**batch)["comp_rgb_fg"].sum()

    loss = red()
    first = drawn.copy()
    drawn.clear()
    (slope,) = torch.autograd.grad(loss, second)
    assert sorted(drawn) == sorted(first)
    assert len(set(first)) == len(first) > 5
    shift = torch.zeros_like(second)
    shift[3, 2] = 1e-5
    with torch.no_grad():
        second += shift
        high = red()
        second -= 2 * shift
        low = red()
    torch.testing.assert_close(slope[3, 2], (high - low) / 2e-5, rtol=1e-6, atol=1e-6)


def test_two_renders_before_one_backward() -> None:
    renderer = make(train_chunk_size=60)
    first, second = make_batch(4), make_batch(3)
    outs, wants = [], []
    for batch in (first, second):
        random.seed(2)
        outs.append(renderer(**batch)["comp_rgb"].square().sum())
        random.seed(2)
        wants.append(dense(renderer, **batch)["comp_rgb"].square().sum())
    found = gradients(outs[0] + outs[1], leaves(renderer))
    for value, other in zip(found, gradients(wants[0] + wants[1], leaves(renderer)), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_colours_of_any_number_of_channels(channels: int) -> None:
    renderer, batch = make("flat", {"n_feature_dims": channels}, train_chunk_size=77), make_batch()
    renderer.background.weight = torch.nn.Parameter(torch.randn(3, channels, dtype=torch.float64))
    out, expected = renderer(**batch), dense(renderer, **batch)
    assert out["comp_rgb"].shape[-1] == channels
    for name in IMAGES:
        torch.testing.assert_close(out[name], expected[name], **EXACT)
    found = gradients(loss_of(out, IMAGES), leaves(renderer))
    for value, other in zip(found, gradients(loss_of(expected, IMAGES), leaves(renderer)), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-8, atol=1e-9)


def test_a_given_background_is_put_behind() -> None:
    renderer, batch = make("flat"), make_batch()
    out = renderer(**batch)
    per_view = torch.rand(2, 3, dtype=torch.float64)
    images = torch.rand(2, 5, 6, 3, dtype=torch.float64)
    for given, behind in ((per_view, per_view[:, None, None]), (images, images), (images.view(-1, 3), images)):
        again = renderer(**batch, bg_color=given)
        wanted = out["comp_rgb_fg"] + behind * (1.0 - out["opacity"])
        torch.testing.assert_close(again["comp_rgb"], wanted, **EXACT)
        torch.testing.assert_close(again["comp_rgb_bg"], out["comp_rgb_bg"])
    with pytest.raises(ValueError, match=r"bg_color: got shape \[7, 3\], want \[2, C\]"):
        renderer(**batch, bg_color=torch.rand(7, 3, dtype=torch.float64))


@pytest.mark.parametrize("samples", [False, True])
def test_rays_that_miss_everything(samples: bool) -> None:
    renderer, batch = make(return_samples=samples, return_comp_normal=True), make_batch()
    batch["rays_d"] = -batch["rays_d"]
    out = renderer(**batch)
    assert not out["opacity"].any()
    assert torch.equal(out["comp_rgb"], out["comp_rgb_bg"])
    assert out["weights"].shape == ((0, 1) if samples else (1, 1))
    out["comp_rgb"].sum().backward()
    assert renderer.background.weight.grad.any()


def test_lengths_of_directions_are_those_of_distances() -> None:
    renderer, batch = make("flat", return_samples=True), make_batch()
    out = renderer(**batch)
    longer = renderer(batch["rays_o"], 2.0 * batch["rays_d"], batch["light_positions"])
    for name in ("opacity", "comp_rgb_fg", "points", "weights"):
        torch.testing.assert_close(longer[name], out[name], **EXACT)
    for name, factor in (("depth", 0.5), ("z_variance", 0.25), ("t_points", 0.5), ("t_dirs", 2.0)):
        torch.testing.assert_close(longer[name], factor * out[name], **EXACT)


def test_jitter_is_of_training_and_of_torchs_seed() -> None:
    renderer, batch = make("flat", randomized=True), make_batch()

    def depth() -> Tensor:
        torch.manual_seed(5)
        return renderer(**batch)["depth"].detach()

    first = depth()
    assert torch.equal(first, depth())
    assert not torch.equal(first, renderer(**batch)["depth"])
    renderer.eval()
    still = renderer(**batch)["depth"]
    assert torch.equal(still, renderer(**batch)["depth"])
    assert not torch.equal(still, first)
    renderer.train()
    assert torch.equal(first, depth())


def test_autocast_reaches_geometry_and_material_in_backward_too() -> None:
    seen: list[torch.dtype] = []

    class Narrow(Blob):
        def forward(self, points: Tensor, output_normal: bool = False) -> dict[str, Tensor]:
            known = super().forward(points, output_normal)
            seen.append(known["features"].dtype)
            return known

    results = []
    for chunk in (ONE, 97):
        renderer, batch = make("flat", train_chunk_size=chunk), make_batch(dtype=torch.float32)
        renderer.set_geometry(Narrow({"radius": RADIUS}).float())
        renderer.background.float()
        with torch.autocast("cpu", torch.bfloat16):
            out = renderer(**batch)
        out["comp_rgb"].square().sum().backward()
        assert {value.dtype for name, value in out.items() if name != "comp_rgb_bg"} == {torch.float32}
        results.append((out["comp_rgb"].detach(), [p.grad for p in renderer.geometry.parameters()]))
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    for value, other in zip(results[1][1], results[0][1], strict=True):
        assert float((value - other).norm() / other.norm()) < 0.02  # sums of bfloat16, chunk by chunk


@pytest.mark.parametrize("material", ["lit", "flat"])
def test_training_holds_no_samples_unless_they_are_handed_out(material: str) -> None:
    made: list[tuple[TensorWeakRef, int]] = []
    most = 0

    def alive() -> int:
        return sum(size for ref, size in made if ref() is not None)

    class Watched(Blob):
        def forward(self, points: Tensor, output_normal: bool = False) -> dict[str, Tensor]:
            nonlocal most
            most = max(most, alive())
            known = super().forward(points, output_normal)
            middle = {name: known[name].exp() for name in ("density", "features")}
            made.extend((TensorWeakRef(t), t.shape[0]) for t in middle.values())
            return known | {name: value.log() for name, value in middle.items()}

    renderer, batch = make(material, num_samples_per_ray=301, train_chunk_size=200), make_batch()
    renderer.set_geometry(Watched({"radius": RADIUS}))
    out = renderer(**batch)
    total = sum(size for _, size in made)
    assert total > 2000
    gc.collect()
    assert alive() == 0
    loss_of(out, IMAGES).backward()
    assert most <= 2 * 200
    made.clear()
    renderer.cfg.return_samples = True
    out = renderer(**batch)
    assert alive() == sum(size for _, size in made) == 2 * len(out["weights"])


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"train_chunk_size": 97}, {"return_samples": True}, {"grid_prune": True}], ids=str)
def test_a_gpu_renders_what_a_cpu_renders(options: dict[str, Any]) -> None:
    results = []
    for device in ("cpu", "cuda"):
        renderer = make(return_comp_normal=True, **options).to(device)
        for part in (renderer.geometry, renderer.material, renderer.background):
            part.to(device)
        if renderer.cfg.grid_prune:  # its points are random, and the device's own
            renderer.estimator.set_occupied(torch.rand(32, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.3)
        random.seed(3)
        out = renderer(**{name: value.to(device) for name, value in make_batch().items()})
        loss = out["comp_rgb"].square().sum() + out["z_variance"].sum() + stock_orientation_loss(out)
        grads = gradients(loss, leaves(renderer))
        assert out["comp_rgb"].device.type == device
        results.append(([out[name].cpu() for name in (*IMAGES, "comp_normal")], [value.cpu() for value in grads]))
    for values, others in zip(results[0], results[1], strict=True):
        for value, other in zip(values, others, strict=True):
            torch.testing.assert_close(other, value, rtol=1e-8, atol=1e-9)
