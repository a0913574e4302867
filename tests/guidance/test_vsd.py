"""Variational score distillation against the same networks with merged weights, in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import write_tiny_prior
from torch import Tensor, nn

from dreamfusion_fast.guidance import GuidanceConfig, GuidanceRequest, ScoreDistillation, Views
from dreamfusion_fast.guidance.config import Mode
from dreamfusion_fast.guidance.methods import VariationalScoreDistillation, VsdConfig
from dreamfusion_fast.guidance.models.embedded.guide import EmbeddedPrior

EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_prior(tmp_path_factory.mktemp("prior") / "prior")


def distillation(folder: Path, mode: Mode = "vsd", **settings: Any) -> ScoreDistillation:
    config = GuidanceConfig(mode=mode, cache=False, clip_x0=False, **settings)
    guidance = ScoreDistillation(EmbeddedPrior("cpu", "float64", folder), config)
    guidance.method.double()
    return guidance


def request(guidance: ScoreDistillation, **settings: Any) -> GuidanceRequest:
    generator = torch.Generator().manual_seed(6)
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=generator)
    poses = torch.randn(2, 4, 4, generator=generator)
    views = Views(torch.tensor([0.2, 3.0]), torch.tensor([0.1, 1.4]), camera_to_world=poses)
    return GuidanceRequest(images, guidance.embed("a cup"), views, generator=generator, **settings)


def shake(method: nn.Module) -> None:
    """Numbers for everything that is zero at first."""
    generator = torch.Generator().manual_seed(2)
    for value in method.parameters():
        with torch.no_grad():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))


class Merged(nn.Module):
    """The network as the LoRA makes it: W + B A, and what the camera adds to the timestep's embedding."""

    def __init__(self, folder: Path, method: VariationalScoreDistillation, poses: Tensor) -> None:
        super().__init__()
        self.network = EmbeddedPrior("cpu", "float64", folder).network
        self.check_group = self.network.check_group
        self.method, self.poses = method, poses.double().flatten(1)
        self.names = [name for name, _ in method.lora.items() if name.endswith("/A")]
        time = self.network.unet.time_embedding
        camera = method.camera
        if camera is not None:
            hidden = torch.nn.functional.silu(self.poses @ camera.first.weight.T + camera.first.bias)
            added = hidden @ camera.second.weight.T + camera.second.bias
            time.register_forward_hook(lambda _, inputs, output: output + added)

    def weights(self) -> dict[str, Tensor]:
        merged = {}
        for name in self.names:
            a, b = self.method.lora[name], self.method.lora[name[:-1] + "B"]
            layer = name[:-2].replace("/", ".")
            merged[f"{layer}.weight"] = self.network.get_parameter(f"{layer}.weight") + b @ a
        return merged

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.func.functional_call(self.network, self.weights(), inputs)


@pytest.mark.parametrize("camera", [True, False])
def test_pull_and_gradients_are_those_of_merged_networks(folder: Path, camera: bool) -> None:
    guidance = distillation(folder, vsd=VsdConfig(rank=3, camera=camera), guidance_scale=4.0)
    method = guidance.method
    assert isinstance(method, VariationalScoreDistillation)
    shake(method)
    asked = request(guidance)
    draws = asked.generator.get_state()  # type: ignore[union-attr]
    out = guidance.gradient(asked)

    generator = torch.Generator()
    generator.set_state(draws)
    t = torch.randint(20, 981, (2,), generator=generator)
    noise = torch.randn(asked.images.shape, generator=generator).double()
    assert torch.equal(out.t, t)
    prior = EmbeddedPrior("cpu", "float64", folder)
    x = 2 * asked.images - 1
    abar = prior.schedule.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    noisy = alpha * x + sigma * noise

    def predicted(network: nn.Module, condition: str) -> Tensor:
        model = copy.copy(prior)
        model.network = network  # type: ignore[assignment]
        with torch.enable_grad():  # the plain network
            return model.predict(noisy, t, asked.embeddings.select((condition,), asked.views), asked.views)

    assert asked.views.camera_to_world is not None
    merged = Merged(folder, method, asked.views.camera_to_world)
    velocity = predicted(merged, "text")
    null, text = (predicted(prior.network, condition) for condition in ("null", "text"))
    guided = null + 4.0 * (text - null)
    residual = alpha * (guided - velocity)  # of the noises that both mean
    torch.testing.assert_close(out.gradient, (2 * sigma**2 * residual).detach(), **EXACT)
    loss = (velocity - (alpha * noise - sigma * x)).square().mean()
    assert out.loss is not None
    torch.testing.assert_close(out.loss, loss.detach(), **EXACT)
    wanted = torch.autograd.grad(loss, list(method.parameters()))
    assert len(wanted) == len(out.parameter_gradients) == len(method.lora) + 4 * camera
    for found, right in zip(out.parameter_gradients, wanted, strict=True):
        assert float(right.abs().max()) > 0
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9 * float(right.abs().max()))


def test_at_first_it_is_sds_without_the_noise(folder: Path) -> None:
    """Adapters that are zero predict what the model does: (s - 1) (text - null) remains, which is csd."""
    vsd = distillation(folder, guidance_scale=4.0)
    csd = distillation(folder, "csd", guidance_scale=3.0)
    found, wanted = (guidance.gradient(request(guidance)).gradient for guidance in (vsd, csd))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # csd runs in other layers


def test_the_frozen_model_stays_the_frozen_model(folder: Path) -> None:
    guidance, plain = distillation(folder), EmbeddedPrior("cpu", "float64", folder)
    shake(guidance.method)
    asked = request(guidance)
    noisy, t = 2 * asked.images - 1, torch.tensor([100, 700])
    rows = asked.embeddings.select(("null", "text"), asked.views)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found, wanted = (model.predict(noisy, t, rows, asked.views) for model in (guidance.model, plain))
        assert torch.equal(found, wanted)


def test_one_learns_while_another_pulls(folder: Path) -> None:
    """With a share of 0 the pull is the other method's, and the LoRA is trained all the same."""
    both = distillation(folder, "sds", second_mode="vsd", guidance_scale=4.0)
    sds = distillation(folder, "sds", second_mode="sds", guidance_scale=4.0)
    vsd = distillation(folder, guidance_scale=4.0)
    alone, other = (guidance.gradient(request(guidance)) for guidance in (sds, vsd))
    for share in (1.0, 0.25, 0.0):
        mixture = both.gradient(request(both, sds_share=share))
        expected = share * alone.gradient + (1 - share) * other.gradient
        torch.testing.assert_close(mixture.gradient, expected, **EXACT)
        for found, right in zip(mixture.parameter_gradients, other.parameter_gradients, strict=True):
            torch.testing.assert_close(found, right, **EXACT)
    assert alone.loss is None


def test_memory_is_asked_for_and_weights_stay(folder: Path) -> None:
    class Heavy(EmbeddedPrior):
        def memory_needs(self, batch: int, render_size: int) -> Any:
            needs = super().memory_needs(batch, render_size)
            return type(needs)(weights=100, unet=10, offloadable=50)

    def needs(**settings: Any) -> Any:
        return ScoreDistillation(Heavy("cpu", "float32", folder), GuidanceConfig(**settings)).memory_needs(1, 64)

    assert (needs().unet, needs().offloadable) == (10, 50)
    assert (needs(perp_neg=True).unet, needs(perp_neg=True).offloadable) == (20, 50)
    assert needs(mode="vsd").unet > 20
    assert needs(mode="vsd").offloadable == 0
