"""The step: that it learns, that it is the step described, that it continues and repeats to the bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fakes import COLOR, BallGuidance, small_config, target
from noisy import TinyLatentModel

from dreamfusion_fast.errors import NonFiniteError, UserError
from dreamfusion_fast.guidance.config import GuidanceConfig
from dreamfusion_fast.guidance.contract import GuidanceOutput, Views
from dreamfusion_fast.guidance.distillation import ScoreDistillation
from dreamfusion_fast.rendering import orbit_cameras
from dreamfusion_fast.rendering.shading import Shading
from dreamfusion_fast.training.checkpoint import load_checkpoint, save_checkpoint
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.device import send
from dreamfusion_fast.training.losses import LOSSES
from dreamfusion_fast.training.opaque import OpaqueThresholds
from dreamfusion_fast.training.sections import (
    BackgroundConfig,
    LossConfig,
    OptimConfig,
    Ramp,
    ScheduleConfig,
    ShadingConfig,
)
from dreamfusion_fast.training.trainer import Trainer

CPU = torch.device("cpu")
NO_LOSS = LossConfig(**{name: Ramp() for name in LOSSES})
QUICK = OptimConfig(lr_table=0.1, lr_mlp=0.02, lr_background=0.05, warmup_steps=5)


def trainer_of(device=CPU, guidance=None, **settings):
    return Trainer(small_config(**settings), device, guidance or BallGuidance())


def parameters(trainer):
    return {name: value.clone() for name, value in trainer.state()[0].items()}


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def distance_to_target(trainer):
    """Mean absolute error of a view on white from what the guidance wants, and how opaque the middle's colour is."""
    picture = trainer.scene.render(orbit_cameras(1), 32)[0].cpu()
    views = Views(torch.zeros(1), torch.zeros(1), torch.ones(1, 3))
    wanted = target(views, 32)[0].permute(1, 2, 0)
    return float((picture - wanted).abs().mean()), picture[12:20, 12:20].mean(dim=(0, 1))


def test_learns_what_the_guidance_wants(device):
    plain, albedo = BackgroundConfig(plain=1.0), ShadingConfig(albedo_steps=1.0)
    trainer = trainer_of(device, steps=80, optim=QUICK, background=plain, shading=albedo)
    before, _ = distance_to_target(trainer)
    first = [float(trainer.step().losses["sds"]) for _ in range(10)]
    last = [float(trainer.step().losses["sds"]) for _ in range(70)][-10:]
    after, middle = distance_to_target(trainer)
    assert sum(last) < 0.5 * sum(first)
    assert after < 0.35 * before
    torch.testing.assert_close(middle, torch.tensor(COLOR), atol=0.1, rtol=0)


@pytest.mark.parametrize("shading", list(Shading))
def test_gradient_of_the_images_is_the_guidance_s(device, shading):
    """Per view and pixel of the model's image, and nothing else acts on the images."""
    shares = {Shading.ALBEDO: (1.0, 0.0), Shading.LAMBERTIAN: (0.0, 0.0), Shading.TEXTURELESS: (0.0, 1.0)}[shading]
    guidance = BallGuidance()
    trainer = trainer_of(device, guidance, batch=3, shading=ShadingConfig(0.0, *shares), loss=NO_LOSS)
    result = trainer.step()
    (call,) = guidance.calls
    assert result.shading is shading
    assert call["views"].shading == shading.value
    assert call["images"].shape == (3, 3, 12, 12)
    torch.testing.assert_close(call["image_grad"], call["gradient"] / (3 * guidance.image_size**2))
    assert float(trainer.scene.field.table.grad.abs().sum()) > 0
    assert ("orientation" in result.losses) == shading.needs_normals
    assert result.samples > 0


def test_views_are_told_what_was_rendered():
    guidance = BallGuidance()
    background = BackgroundConfig(plain=1.0, white=0.5)
    trainer = trainer_of(guidance=guidance, steps=40, background=background)
    for _ in range(40):
        trainer.step()
    colors = torch.cat([call["views"].background for call in guidance.calls])
    white = (colors == 1).all(dim=1).float().mean()
    assert 0.3 < white < 0.7
    for call in guidance.calls:
        # The corner of a view misses the ball that holds the object.
        torch.testing.assert_close(call["images"][:, :, 0, 0], call["views"].background)
        assert call["views"].azimuth.shape == call["views"].elevation.shape == (2,)
    azimuths = torch.cat([call["views"].azimuth for call in guidance.calls])
    assert azimuths.abs().max() <= torch.pi
    assert azimuths.std() > 1.0


def test_learned_background_is_told_as_unknown_and_learns():
    guidance = BallGuidance()
    background = BackgroundConfig(plain=0.0, frequencies=2, hidden=8)
    trainer = trainer_of(guidance=guidance, steps=30, optim=QUICK, background=background)
    for _ in range(30):
        trainer.step()
    corners = [call["images"][:, :, 0, 0].mean() for call in guidance.calls]
    assert all(call["views"].background is None for call in guidance.calls)
    assert corners[-1] < corners[0] - 0.1  # towards the black of `target`


def test_schedule_goes_by_the_share_of_the_run():
    guidance = BallGuidance()
    schedule = ScheduleConfig(0.1, 0.9, 0.3, "linear", 12, 16, 0.5)
    shading = ShadingConfig(albedo_steps=0.5, albedo_probability=0.0)
    trainer = trainer_of(guidance=guidance, steps=8, schedule=schedule, shading=shading)
    results = [trainer.step() for _ in range(8)]
    assert [result.size for result in results] == [12] * 4 + [16] * 4
    assert [call["images"].shape[-1] for call in guidance.calls] == [12] * 4 + [16] * 4
    assert [call["t_range"] for call in guidance.calls] == [schedule.t_range(k / 8) for k in range(8)]
    assert [result.shading is Shading.ALBEDO for result in results] == [True] * 4 + [False] * 4
    assert [result.step for result in results] == list(range(1, 9))


def test_shading_mix():
    trainer = trainer_of(shading=ShadingConfig(0.0, albedo_probability=0.25, textureless_probability=0.5))
    drawn = [trainer._sampler._draw_shading(0.5) for _ in range(400)]
    shares = [sum(kind is shading for kind in drawn) / 400 for shading in Shading]
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.08)


def test_learning_rates_warm_up_and_fall():
    optim = OptimConfig(lr_table=0.1, lr_mlp=0.01, lr_background=0.001, warmup_steps=4, final_lr_factor=0.2)
    trainer = trainer_of(steps=20, optim=optim)
    rates = []
    for _ in range(20):
        trainer.step()
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
    table = [rate[0] for rate in rates]
    assert table[0] == pytest.approx(0.1 / 4)
    assert max(table) < 0.1
    assert table.index(max(table)) == 3
    assert sorted(table[3:], reverse=True) == table[3:]
    assert 0.02 < table[-1] < 0.025
    for rate in rates:
        assert rate == pytest.approx([rate[0], rate[0] / 10, rate[0] / 100])


def test_every_loss_has_a_weight_of_its_name():
    assert set(LOSSES) == {field.name for field in dataclasses.fields(LossConfig)}


@pytest.mark.parametrize("name", ["opacity", "ray_entropy", "binary", "sample_entropy", "distortion"])
def test_opacity_losses_do_what_they_say(name):
    """Alone: the scene gets empty, rays hit or miss, samples absorb all or nothing, or few of a ray do."""
    loss = dataclasses.replace(NO_LOSS, **{name: Ramp(1.0, 1.0)})
    trainer = trainer_of(guidance=BallGuidance(strength=0.0), steps=25, optim=QUICK, loss=loss)
    values = [float(trainer.step().losses[name]) for _ in range(25)]
    assert sum(values[-5:]) < 0.7 * sum(values[:5])
    if name != "binary":  # what it wants of a pixel changes with the view, and as it passes the threshold
        assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("threshold", [0.05, 0.95])
def test_what_is_above_the_threshold_becomes_opaque_and_the_rest_clear(threshold):
    loss = dataclasses.replace(NO_LOSS, binary=Ramp(1.0, 1.0))
    opaque = OpaqueThresholds(threshold, threshold)
    trainer = trainer_of(guidance=BallGuidance(strength=0.0), steps=25, optim=QUICK, loss=loss, opaque=opaque)
    opacities = [trainer.step().losses["opacity"] for _ in range(25)]
    assert (opacities[-1] > opacities[0]) == (threshold < 0.5)


def test_share_of_score_distillation_follows_its_ramp():
    guidance = BallGuidance()
    schedule = dataclasses.replace(small_config().schedule, sds_share=Ramp(1.0, 0.2, 0.25, 0.75))
    trainer = trainer_of(guidance=guidance, steps=4, schedule=schedule)
    for _ in range(4):
        trainer.step()
    assert [call["sds_share"] for call in guidance.calls] == pytest.approx([1.0, 1.0, 0.6, 0.2])


def test_views_per_step_are_those_that_the_device_makes_cheap():
    assert [Config().batch_on(torch.device(name)) for name in ("cpu", "cuda", "cuda:1")] == [2, 8, 8]
    assert Config(batch=3).batch_on(CPU) == Config(batch=3).batch_on(torch.device("cuda")) == 3
    guidance = BallGuidance()
    trainer_of(guidance=guidance, batch=None).step()
    assert len(guidance.calls[0]["images"]) == 2


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_the_losses_follow_their_ramps(name):
    """With no pull from the guidance, the gradient is the weight at that time times the loss's own."""

    def gradient(ramp, progress):
        loss = dataclasses.replace(NO_LOSS, **{name: ramp})
        shading = ShadingConfig(0.0, 0.0, 0.0)
        trainer = trainer_of(guidance=BallGuidance(strength=0.0), steps=8, loss=loss, shading=shading)
        trainer.steps_done = round(8 * progress)
        trainer.step()
        return trainer.scene.field.table.grad

    ramp = Ramp(1.0, 5.0, 0.25, 0.75)
    one = gradient(ramp, 0.125)
    assert float(one.abs().max()) > 1e-8
    torch.testing.assert_close(gradient(Ramp(1.0, 1.0), 0.5) * 3.0, gradient(ramp, 0.5))
    torch.testing.assert_close(gradient(Ramp(1.0, 1.0), 0.875) * 5.0, gradient(ramp, 0.875))
    assert not gradient(Ramp(0.0, 1.0, 0.25, 0.75), 0.125).any()


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_resumed_run_repeats_the_uninterrupted_one(tmp_path, stop):
    """To the bit: parameters, optimiser, occupancy grid, random numbers; through a file."""
    config = small_config(steps=14)
    whole = Trainer(config, CPU, BallGuidance())
    for _ in range(14):
        whole.step()

    first = Trainer(config, CPU, BallGuidance())
    for _ in range(stop):
        first.step()
    tensors, meta = first.state()
    save_checkpoint(tmp_path / "c.safetensors", tensors=tensors, config=config, step=first.steps_done, meta=meta)
    second = Trainer(config, CPU, BallGuidance())
    second.restore(load_checkpoint(tmp_path / "c.safetensors", config))
    assert second.steps_done == stop
    assert_same_bits(parameters(first), parameters(second))
    for _ in range(14 - stop):
        second.step()
    assert second.steps_done == 14
    assert_same_bits(parameters(whole), parameters(second))


def test_same_seed_same_bits_and_another_seed_others():
    def run(seed):
        torch.rand(1)  # torch's own random numbers have no part in it
        trainer = trainer_of(seed=seed)
        for _ in range(6):
            trainer.step()
        return parameters(trainer)

    first, again, other = run(3), run(3), run(4)
    assert_same_bits(first, again)
    assert not torch.equal(first["field.table"], other["field.table"])
    assert not torch.equal(first["generator"], other["generator"])


def test_looking_at_a_run_does_not_change_it():
    watched, alone = trainer_of(), trainer_of()
    for _ in range(5):
        watched.scene.render(orbit_cameras(2), 8, Shading.LAMBERTIAN)
        watched.step()
        alone.step()
    assert_same_bits(parameters(watched), parameters(alone))


def test_nan_from_the_guidance_stops_before_the_parameters(device):
    trainer = trainer_of(device, BallGuidance(nan_at=3))
    for _ in range(3):
        trainer.step()
    before = parameters(trainer)
    if device.type == "cpu":
        with pytest.raises(NonFiniteError, match=r"the total loss became nan at step 4: lower --optim\.lr-table"):
            trainer.step()
        assert trainer.steps_done == 3
        for name, value in parameters(trainer).items():
            if name.startswith(("field.", "background.")):
                assert torch.equal(value, before[name]), name
        trainer.check_parameters()
    else:  # found where something waits for the GPU anyway
        trainer.step()
        with pytest.raises(NonFiniteError, match="the parameters field"):
            trainer.check_parameters()


def test_nan_in_the_field_is_named():
    trainer = trainer_of()
    trainer.step()
    with torch.no_grad():
        trainer.scene.field.table[5:50] = float("nan")
    with pytest.raises(NonFiniteError, match="loss became nan at step 2"):
        trainer.step()
    with pytest.raises(NonFiniteError, match=r"the parameters field\.table hold a NaN"):
        trainer.check_parameters()


def test_checkpoint_that_does_not_fit(tmp_path):
    config = small_config()
    tensors, meta = Trainer(config, CPU, BallGuidance()).state()
    path = tmp_path / "c.safetensors"
    for broken, words in (
        ({name: value for name, value in tensors.items() if name != "generator"}, "generator"),
        ({name: value for name, value in tensors.items() if name != "field.table"}, "table"),
        (tensors | {"field.table": torch.zeros(3, 2)}, "size mismatch"),
    ):
        save_checkpoint(path, tensors=broken, config=config, step=3, meta=meta)
        with pytest.raises(UserError, match=f"does not fit this config.*{words}"):
            Trainer(config, CPU, BallGuidance()).restore(load_checkpoint(path))


def test_latent_model_with_a_render_of_its_own_size():
    """--schedule.render-size 512: nothing is resized on the way to the autoencoder."""
    model = TinyLatentModel(512)
    sizes = []
    encode = model.encode
    model.encode = lambda images: sizes.append(tuple(images.shape)) or encode(images)
    guidance = ScoreDistillation(model, GuidanceConfig(name="tiny", cache=False))
    schedule = ScheduleConfig(render_size_start=16, render_size=512, render_size_until=0.5)
    trainer = trainer_of(guidance=guidance, steps=2, batch=1, schedule=schedule, shading=ShadingConfig(0.0, 0.0, 1.0))
    results = [trainer.step() for _ in range(2)]
    assert sizes == [(1, 3, 16, 16), (1, 3, 512, 512)]
    assert [result.size for result in results] == [16, 512]
    assert results[1].shading.needs_normals
    assert torch.isfinite(results[1].losses["sds"])
    assert float(trainer.scene.field.table.grad.abs().sum()) > 0


class Pull(BallGuidance):
    """Pulls images towards grey, without a wait for the GPU."""

    def gradient(self, request):
        images = request.images.detach()
        (t,) = send(images.device, torch.randint(0, 1000, (len(images),), generator=request.generator))
        pull = images - 0.5
        return GuidanceOutput(pull, t, pull.flatten(1).norm(dim=1))


@pytest.mark.gpu
def test_steps_between_updates_of_the_grid_wait_for_nothing_until_they_are_two_ahead():
    """In the step of an update, samples can only be counted once the grid is new."""
    trainer = trainer_of(torch.device("cuda"), Pull(), steps=40)
    for _ in range(29):  # past the change of size at half of the run, and past captures
        trainer.step()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # a second
    before = torch.cuda.current_stream().record_event()
    for ahead in (True, True, False):
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert before.query() != ahead


@pytest.mark.gpu
def test_views_drawn_beside_the_last_step_are_those_drawn_in_line():
    """With all that a step changes: the grid, sizes, and kinds of shading and background."""
    shading = ShadingConfig(albedo_steps=0.2, albedo_probability=0.4)
    results = []
    for aside in (True, False):
        guidance = Pull()
        trainer = trainer_of(torch.device("cuda"), guidance, steps=30, shading=shading)
        if not aside:
            trainer._sampler._stream = None
        seen = []
        render = trainer.scene.renderer.render

        def watched(prepared, *arguments, render=render, seen=seen, **options):
            output = render(prepared, *arguments, **options)
            seen.append((prepared.rays.origins.clone(), prepared.rays.directions.clone(), output.samples))
            return output

        trainer.scene.renderer.render = watched
        for _ in range(30):
            trainer.step()
        results.append(seen)
    for (origins, directions, samples), (others, other_directions, wanted) in zip(*results, strict=True):
        torch.testing.assert_close(origins, others, rtol=0, atol=0)
        torch.testing.assert_close(directions, other_directions, rtol=0, atol=0)
        assert abs(samples - wanted) <= 0.02 * wanted  # the grid depends on the field, its gradients on atomics


@pytest.mark.parametrize("shading", list(Shading))
def test_pictures_of_the_scene(device, shading):
    pictures = trainer_of(device).scene.render(orbit_cameras(2, start_deg=90.0), 24, shading)
    assert pictures.shape == (2, 24, 24, 3)
    picture = pictures[0]
    assert picture.dtype == torch.float32
    assert not picture.requires_grad
    assert float(picture.min()) >= 0.0
    assert float(picture.max()) <= 1.0 + 1e-6
    torch.testing.assert_close(picture[0, 0].cpu(), torch.ones(3))
    assert float(picture[12, 12].mean()) < 0.95


def test_wrong_configs_are_refused_before_anything_is_made():
    with pytest.raises(UserError, match="the prompt is empty"):
        trainer_of(prompt="  ")
    with pytest.raises(UserError, match="batch: got 0, want at least 1"):
        trainer_of(batch=0)
