"""The optimisation: render random views, ask the guidance for a gradient, push it back through the renderer.

One step is DreamFusion's algorithm (Poole et al. 2022, section 3): camera and light are drawn, the field is rendered
with a shading drawn with them, the guidance returns the score distillation gradient of the images, and regularisers on
opacity and normals are added. Nothing here knows which diffusion model guides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamfusion_fast.errors import NonFiniteError, UserError
from dreamfusion_fast.fields.background import MlpBackground, per_view, random_colors
from dreamfusion_fast.fields.hash_field import HashGridField
from dreamfusion_fast.guidance.base import Guidance, Views, create_guidance
from dreamfusion_fast.rendering.cameras import Cameras, orbit_cameras, sample_cameras
from dreamfusion_fast.rendering.occupancy import OccupancyGrid
from dreamfusion_fast.rendering.renderer import RenderOutput, VolumeRenderer
from dreamfusion_fast.rendering.shading import Shading, sample_lights
from dreamfusion_fast.training.checkpoint import Checkpoint, flatten_optimizer, restore_optimizer
from dreamfusion_fast.training.config import Config

_OPACITY_EPS = 0.01  # under the root of the opacity loss (DreamFusion, appendix A.2)


@dataclass(frozen=True)
class StepResult:
    """What one step did. The losses are 0-dim tensors on the device: reading one waits for it.

    Attributes:
        step: steps done so far.
        losses: name -> value before its weight; "sds" is the root mean square of eps_hat - eps.
        shading: how the views were shaded.
        size: height and width of the views, pixels.
        samples: points at which the field was evaluated for the images; a 0-dim tensor in a CUDA graph.
    """

    step: int
    losses: dict[str, Tensor]
    shading: Shading
    size: int
    samples: int | Tensor


class Trainer:
    """Everything that a run optimises, and the step that does it.

    Args:
        config: the run's settings.
        device: where it runs.
        guidance: what pulls; by default the model that the config names.

    Everything random comes from one CPU generator seeded by `config.seed`, so the same seed gives the same numbers on
    every device up to rounding, and on a CPU the same mesh.
    """

    def __init__(self, config: Config, device: torch.device, guidance: Guidance | None = None) -> None:
        config.check()
        self.config = config
        self.device = device
        self.generator = torch.Generator().manual_seed(config.seed)
        self.field = HashGridField(config.field, generator=self.generator).to(device)
        self.background = MlpBackground(
            config.background.frequencies, config.background.hidden, generator=self.generator
        ).to(device)
        o = config.occupancy
        step_size = VolumeRenderer(self.field, None, config.renderer).step_size
        self.occupancy = OccupancyGrid(
            self.field.aabb, o.resolution, o.decay, o.every, o.warmup_steps, o.alpha_threshold, step_size, config.seed
        ).to(device)
        self.renderer = VolumeRenderer(self.field, self.occupancy, config.renderer)
        self.guidance = create_guidance(config.guidance, device) if guidance is None else guidance
        self.embeddings = self.guidance.embed(config.prompt)
        self.optimizer = self._make_optimizer()
        self.steps_done = 0

    def _make_optimizer(self) -> torch.optim.Adam:
        c = self.config.optim
        groups = [
            {"params": [self.field.table], "peak": c.lr_table},
            {"params": list(self.field.layers.parameters()), "peak": c.lr_mlp},
            {"params": list(self.background.parameters()), "peak": c.lr_background},
        ]
        return torch.optim.Adam(groups, lr=c.lr_mlp, betas=c.betas, eps=c.eps, fused=True)

    def step(self) -> StepResult:
        """One optimiser step on `config.batch` random views.

        Raises:
            NonFiniteError: images, losses or gradients hold a NaN or an infinity.
        """
        config, progress = self.config, self.steps_done / self.config.steps
        self._set_learning_rates(progress)
        self.occupancy.update(self.field, self.steps_done)

        size = config.schedule.size(progress)
        shading = self._draw_shading(progress)
        cameras = sample_cameras(config.camera, config.batch, self.generator, self.device)
        plain = self._draw_backgrounds()
        output = self._render_training(cameras, size, shading, plain)
        images = output.color.view(config.batch, size, size, 3).permute(0, 3, 1, 2)
        views = Views(cameras.azimuth, cameras.elevation, plain, shading.value)
        pull = self.guidance.sds_gradient(
            images, self.embeddings, views, t_range=config.schedule.t_range(progress), generator=self.generator
        )

        losses = {"sds": pull.residual.mean(), **self._regularisers(output)}
        weights = {name: getattr(config.loss, name).at(progress) for name in losses if name != "sds"}
        # The guidance's gradient is a sum over its pixels; per pixel it has one size whatever the model's resolution.
        total = (images * pull.gradient).sum() / (config.batch * self.guidance.image_size**2)
        total = total + sum(weights[name] * losses[name] for name in weights)
        losses = {name: value.detach() for name, value in losses.items()}
        result = StepResult(self.steps_done + 1, losses, shading, size, output.samples)
        if self.device.type == "cpu":  # before the parameters are touched; on a GPU it would wait
            self.check_finite(result, total.detach())
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        self.steps_done += 1
        return result

    def check_finite(self, result: StepResult, total: Tensor | None = None) -> None:
        """Raise NonFiniteError if a loss of `result`, or their weighted sum, is not finite; waits for the GPU."""
        sums = {} if total is None else {"total": total}
        for name, value in (result.losses | sums).items():
            if not math.isfinite(float(value)):
                raise NonFiniteError(
                    f"the {name} loss became {float(value)} at step {result.step}: lower --optim.lr-table or a loss "
                    "weight and resume from the last checkpoint"
                )

    def check_parameters(self) -> None:
        """Raise NonFiniteError if a parameter is not finite; waits for the GPU."""
        for module_name, module in self._modules():
            for name, parameter in module.named_parameters():
                # The sum is not finite where one element is not, and needs no mask of the table's size.
                if not math.isfinite(float(parameter.detach().double().sum())):
                    raise NonFiniteError(
                        f"the parameters {module_name}.{name} hold a NaN or an infinity after step {self.steps_done}: "
                        "lower --optim.lr-table or a loss weight and resume from the last checkpoint"
                    )

    def _set_learning_rates(self, progress: float) -> None:
        c = self.config.optim
        warm = min(1.0, (self.steps_done + 1) / max(c.warmup_steps, 1))
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        factor = warm * (c.final_lr_factor + (1.0 - c.final_lr_factor) * cosine)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def _draw_shading(self, progress: float) -> Shading:
        c = self.config.shading
        draw = float(torch.rand((), generator=self.generator))
        if progress < c.albedo_steps or draw < c.albedo_probability:
            return Shading.ALBEDO
        return Shading.TEXTURELESS if draw < c.albedo_probability + c.textureless_probability else Shading.LAMBERTIAN

    def _draw_backgrounds(self) -> Tensor | None:
        """Plain colours `[B, 3]`, or None for the learned background."""
        c, batch = self.config.background, self.config.batch
        draws = torch.rand(batch + 1, generator=self.generator)
        colors = random_colors(batch, self.generator)
        if float(draws[0]) >= c.plain:
            return None
        return torch.where((draws[1:] < c.white)[:, None], torch.ones_like(colors), colors).to(self.device)

    def _render_training(self, cameras: Cameras, size: int, shading: Shading, plain: Tensor | None) -> RenderOutput:
        config, per_image = self.config, size * size
        lights = sample_lights(cameras.positions, self.generator, distance=config.shading.light_distance)
        seed = int(torch.randint(2**31 - 1, (), generator=self.generator))
        return self.renderer.render(
            cameras.rays(size, size),
            self.background if plain is None else per_view(plain, per_image),
            shading,
            per_view(lights, per_image) if shading.needs_normals else None,
            jitter=True,
            seed=seed,
            ambient=config.shading.ambient,
            diffuse=config.shading.diffuse,
        )

    def _regularisers(self, output: RenderOutput) -> dict[str, Tensor]:
        """Means over rays; the orientation loss exists in the steps whose shading has computed normals."""
        opacity = output.opacity.clamp(1e-5, 1.0 - 1e-5)
        losses = {
            "opacity": (output.opacity.square() + _OPACITY_EPS).sqrt().mean(),
            "entropy": -(opacity * opacity.log() + (1 - opacity) * (1 - opacity).log()).mean(),
        }
        if output.orientation_loss is not None:
            losses["orientation"] = output.orientation_loss
        return losses

    @torch.no_grad()
    def render_view(
        self,
        azimuth_deg: float,
        size: int,
        elevation_deg: float = 15.0,
        shading: Shading | str = Shading.ALBEDO,
        ambient: float | None = None,
        diffuse: float | None = None,
    ) -> Tensor:
        """A picture `[size, size, 3]` on white, float32 in [0, 1]; light, where the shading asks for it, from above.

        `ambient` and `diffuse` are the config's where they are None.
        """
        c = self.config.shading
        camera = orbit_cameras(1, elevation_deg, start_deg=azimuth_deg, device=self.device)
        light = camera.positions[0] + torch.tensor([0.5, 1.0, 0.0], device=self.device)
        output = self.renderer.render(
            camera.rays(size, size),
            torch.ones(3, device=self.device),
            shading,
            light,
            ambient=c.ambient if ambient is None else ambient,
            diffuse=c.diffuse if diffuse is None else diffuse,
        )
        return output.color.view(size, size, 3)

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Tensors and JSON values from which `restore` continues this run exactly."""
        tensors = {"generator": self.generator.get_state()}
        for name, module in self._modules():
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        moments, rest = flatten_optimizer(self.optimizer)
        return tensors | moments, {"optimizer": rest}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` was written, by a config of this architecture (`load_checkpoint` checks it).

        Raises:
            UserError: it lacks something, or something in it has another shape.
        """
        try:
            for name, module in self._modules():
                module.load_state_dict(checkpoint.group(name))
            restore_optimizer(self.optimizer, checkpoint.tensors, checkpoint.meta["optimizer"])
            self.generator.set_state(checkpoint.tensors["generator"])
        except (KeyError, RuntimeError) as error:  # load_state_dict raises the latter
            raise UserError(f"the checkpoint does not fit this config: {' '.join(str(error).split())}") from error
        self.steps_done = checkpoint.step

    def _modules(self) -> list[tuple[str, torch.nn.Module]]:
        return [("field", self.field), ("background", self.background), ("occupancy", self.occupancy)]
