"""Variational Score Distillation (ProlificDreamer, Wang et al. 2023, arXiv 2305.16213)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance.contract import DiffusionModel, Views
from dreamfusion_fast.guidance.methods.method import Guiding, Method, Predictions
from dreamfusion_fast.guidance.models.schedule import FlowMatching
from dreamfusion_fast.networks.lora import LoraAdapters
from dreamfusion_fast.settings import Range, Settings


@dataclass(frozen=True)
class VsdConfig(Settings):
    """Mode vsd: the LoRA that learns the renders. Defaults are the authors' and threestudio's."""

    rank: Annotated[int, Range(1, 1024)] = 4
    """Rank of the adapters of all attention layers."""
    learning_rate: Annotated[float, Range(0)] = 1e-4
    """Of the adapters and the camera's embedding, in all steps."""
    camera: bool = True
    """Tell the LoRA the camera's pose, through an embedding beside that of the timestep, where the network has one."""


class VariationalScoreDistillation(Method):
    """eps_hat(x_t) - eps_phi(x_t, text, camera), w(t) = sigma_t^2; eps_phi is the model with a LoRA.

    The LoRA learns to predict renders: its loss is the model's own, the mean square of its output less what x and n
    would have it say. It is trained on the timesteps and noise of the pull, in one evaluation for both, where the
    authors draw others. Its text is that of the view, as in the guided prediction. There is one particle: one object is
    optimised in a run.

    Args:
        config: of the LoRA.
    """

    guidance_scale = 7.5

    def __init__(self, config: VsdConfig | None = None) -> None:
        super().__init__()
        self.config = config or VsdConfig()
        self.learning_rate = self.config.learning_rate
        self.camera: CameraEmbedding | None = None

    def attach(self, model: DiffusionModel, guiding: Guiding) -> None:
        """See `Method.attach`. The model's network gets adapters, which start with the same numbers in all runs."""
        if isinstance(model.schedule, FlowMatching):
            raise UserError(f"guidance mode vsd: {model.name!r} is a flow-matching model: use mode rfds, sds or ism")
        network, generator = model.trainable_network(), torch.Generator().manual_seed(0)
        self._adapters = LoraAdapters(network, self.config.rank, generator=generator)
        self.lora = nn.ParameterDict(self._adapters.parameters)
        time = [layer for name, layer in network.named_modules() if name.rpartition(".")[2] == "time_embedding"]
        if self.config.camera and time:
            self.camera = CameraEmbedding(time[0], generator)
        super().attach(model, guiding)

    def prepare(self, predictions: Predictions) -> Predictions:
        """See `Method.prepare`: the LoRA's prediction, with a graph."""
        p = predictions
        with torch.enable_grad(), self._adapters.on(), self._told(p.views):
            output = p.predict(("text",))["text"]
        return replace(p, trained=output, reference=p.level.noise(output.detach(), p.noisy))

    @contextmanager
    def _told(self, views: Views) -> Iterator[None]:
        if self.camera is None:
            yield
            return
        with self.camera.told(views):
            yield

    def residual(self, predictions: Predictions) -> Tensor:
        """See `Method.residual`."""
        return self.error(predictions)

    def loss(self, predictions: Predictions) -> Tensor:
        """See `Method.loss`."""
        p = predictions
        assert p.trained is not None
        return (p.trained - p.level.output(p.clean, p.noise)).square().mean()


class CameraEmbedding(nn.Module):
    """Adds an embedding of a camera's pose to that of the timestep, within `told`; zero at first.

    Args:
        time: the layer that makes the timestep's embedding, [n, width]. It gets a hook.
        generator: of the weights, on the CPU.
    """

    def __init__(self, time: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        width = _width(time)
        self.first, self.second = nn.utils.skip_init(nn.Linear, 16, width), nn.utils.skip_init(nn.Linear, width, width)
        with torch.no_grad():
            for value in self.first.parameters():
                value.uniform_(-0.25, 0.25, generator=generator)  # 1 / sqrt(16)
            for value in self.second.parameters():
                value.zero_()
        self._pose: Tensor | None = None
        time.register_forward_hook(self._add)

    @contextmanager
    def told(self, views: Views) -> Iterator[None]:
        """Within it the network is told these cameras; zeros where they are not known."""
        pose = views.camera_to_world
        if pose is None:
            pose = views.azimuth.new_zeros(len(views), 4, 4)
        self._pose = pose.flatten(1).to(self.first.weight.dtype)
        try:
            yield
        finally:
            self._pose = None

    def _add(self, _: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if self._pose is None:
            return None
        embedded = self.second(nn.functional.silu(self.first(self._pose)))
        return output + embedded.repeat(len(output) // len(embedded), 1).to(output.dtype)


def _width(time: nn.Module) -> int:
    """Outputs of a timestep's embedding: those of its last linear layer."""
    return [layer for layer in time.modules() if isinstance(layer, nn.Linear)][-1].out_features
