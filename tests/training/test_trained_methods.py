"""A method with parameters of its own: trained by its loss in the run's steps, and restored from checkpoints."""

from __future__ import annotations

import pytest
import torch
from fakes import BallGuidance, small_config, write_tiny_prior
from noisy import TinyLatentModel
from torch import nn

from dreamfusion_fast import Generator
from dreamfusion_fast.errors import NonFiniteError, UserError
from dreamfusion_fast.guidance import GuidanceConfig, GuidanceRequest, Method, ScoreDistillation, Views
from dreamfusion_fast.guidance.models.embedded.guide import EmbeddedPrior
from dreamfusion_fast.training.checkpoint import load_checkpoint
from dreamfusion_fast.training.sections import OptimConfig
from dreamfusion_fast.training.trainer import Trainer

CPU = torch.device("cpu")


class Variational(Method):
    """Variational score distillation (Wang et al. 2023, arXiv 2305.16213), with a LoRA on one convolution."""

    learning_rate = 0.005

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.down = nn.Conv2d(layer.in_channels, 2, 3, padding=1, bias=False)
        self.up = nn.Conv2d(2, layer.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)
        self._on = False
        layer.register_forward_hook(lambda _, inputs, output: output + self.up(self.down(*inputs)) * self._on)

    def _own_noise(self, p):
        self._on = True
        try:
            return p.level.noise(p.predict(("text",))["text"], p.noisy)
        finally:
            self._on = False

    def residual(self, p):
        return p.level.noise(self.guided(p), p.noisy) - self._own_noise(p)

    def loss(self, p):
        return (self._own_noise(p) - p.noise).square().mean()


@pytest.fixture(params=["latent", "embedded"])
def distilled(request, tmp_path):
    """distilled() -> a new guidance by VSD, always the same one."""
    folder = write_tiny_prior(tmp_path / "prior") if request.param == "embedded" else None

    def get() -> ScoreDistillation:
        config = GuidanceConfig(guidance_scale=2.0, cache=False)
        if folder is None:
            model = TinyLatentModel()
            return ScoreDistillation(model, config, method=Variational(model._unet))
        model = EmbeddedPrior("cpu", "float32", folder, fused=False)
        return ScoreDistillation(model, config, method=Variational(model.network.unet.conv_out))

    return get


def trainer_of(guidance, **settings):
    return Trainer(small_config(**settings), CPU, guidance)


@pytest.mark.quick(1)
def test_its_loss_falls_and_its_parameters_move(distilled):
    """The scene stands still, so that two runs are shown the same images: one trains the method, one does not."""
    losses = []
    for learning_rate in (0.0, Variational.learning_rate):
        guidance = distilled()
        before = {name: value.clone() for name, value in guidance.method.state_dict().items()}
        guidance.parameter_groups()[0]["lr"] = learning_rate
        trainer = trainer_of(guidance, steps=25, optim=OptimConfig(0.0, 0.0, 0.0))
        losses.append([float(trainer.step().losses["method"]) for _ in range(25)])
        assert trainer.optimizer.param_groups[-1]["lr"] == learning_rate
    untrained, trained = losses
    assert trained[0] == untrained[0]
    assert sum(trained[-10:]) < 0.99 * sum(untrained[-10:])
    assert set(before) == {"up.weight", "down.weight"}
    for name, value in guidance.method.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_its_gradient_is_the_loss_own_in_parts_too(distilled):
    views, images = Views(torch.zeros(3), torch.tensor([0.0, 0.2, 1.4])), torch.rand(3, 3, 16, 16)
    guidance = distilled()
    nn.init.ones_(guidance.method.up.weight)
    own_loss, seen = guidance.method.loss, []
    guidance.method.loss = lambda p: seen.append(p) or own_loss(p)
    outputs = []
    for views_per_call in (None, 2):
        generator = torch.Generator().manual_seed(3)
        request = GuidanceRequest(
            images, guidance.embed("a ball"), views, generator=generator, views_per_call=views_per_call
        )
        outputs.append(guidance.gradient(request))
    assert [len(p.noisy) for p in seen] == [3, 2, 1]
    loss = own_loss(seen[0])  # once more, of all views
    wanted = torch.autograd.grad(loss, list(guidance.method.parameters()))
    for output in outputs:
        torch.testing.assert_close(output.loss, loss.detach(), rtol=1e-5, atol=1e-6)
        for found, right in zip(output.parameter_gradients, wanted, strict=True):
            assert float(right.abs().max()) > 0
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))
    torch.testing.assert_close(outputs[1].gradient, outputs[0].gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("distilled", ["latent"], indirect=True)
def test_a_resumed_run_goes_on_as_if_nothing_had_been(distilled, tmp_path):
    def generator_of(name, guidance):
        return Generator(small_config(steps=8, out=str(tmp_path / name)), guidance=guidance)

    generator_of("whole", distilled()).run()
    first = distilled()
    gradient, calls = first.gradient, []

    def until_the_fourth(request):
        calls.append(request)
        if len(calls) >= 4:
            raise torch.OutOfMemoryError("Tried to allocate 1.00 GiB")
        return gradient(request)

    first.gradient = until_the_fourth
    with pytest.raises(UserError, match="out of memory in step 4"):
        generator_of("run", first).run()
    path = tmp_path / "run" / "checkpoint.safetensors"
    half = load_checkpoint(path)
    assert half.step == 3
    for name, value in first.method.state_dict().items():
        assert torch.equal(half.tensors[f"guidance.{name}"], value)

    Generator.resume(tmp_path / "run", guidance=distilled()).run()
    resumed, whole = (load_checkpoint(tmp_path / name / path.name).tensors for name in ("run", "whole"))
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    assert not torch.equal(whole["guidance.up.weight"], half.tensors["guidance.up.weight"])


@pytest.mark.parametrize("mode", ["sds", "csd"])
def test_methods_that_train_nothing_leave_nothing_in_checkpoints(mode):
    trainer = trainer_of(ScoreDistillation(TinyLatentModel(), GuidanceConfig(mode=mode, cache=False)))
    result = trainer.step()
    assert not any(name.startswith("guidance") for name in trainer.state()[0])
    assert "method" not in result.losses
    assert len(trainer.optimizer.param_groups) == 3


@pytest.mark.quick(1)
@pytest.mark.parametrize("distilled", ["latent"], indirect=True)
@pytest.mark.parametrize("there", [True, False])
def test_a_checkpoint_of_another_method_is_refused(distilled, tmp_path, there):
    """A state that the method lacks, and one that it does not know."""
    config = small_config(steps=2, out=str(tmp_path / "run"))
    guidances = [distilled(), BallGuidance()]
    Generator(config, guidance=guidances[there]).run()
    with pytest.raises(UserError, match=r"the checkpoint does not fit this config: .*(up\.weight|has no state)"):
        Generator.resume(tmp_path / "run", guidance=guidances[not there]).run()


@pytest.mark.parametrize("distilled", ["latent"], indirect=True)
def test_parameters_that_are_not_finite_are_not_saved(distilled):
    trainer = trainer_of(distilled())
    nn.init.constant_(trainer.guidance.method.up.weight, float("nan"))
    with pytest.raises(NonFiniteError, match=r"the parameters of .* hold a NaN or an infinity after step 0"):
        trainer.check_parameters()
