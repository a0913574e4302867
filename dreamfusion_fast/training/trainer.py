"""The optimisation: render random views, ask the guidance for a gradient, push it back through the renderer.

One step is DreamFusion's algorithm (Poole et al. 2022, section 3): camera and light are drawn, the field is rendered
with a shading drawn with them, the guidance returns the score distillation gradient of the images, and regularisers on
opacity and normals are added. Nothing here knows which diffusion model guides.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dreamfusion_fast.errors import DoesNotFitError, NonFiniteError, UserError
from dreamfusion_fast.gpu.memory import is_out_of_memory, what_was_wanted
from dreamfusion_fast.gpu.stages import stage
from dreamfusion_fast.guidance.contract import Guidance, GuidanceRequest
from dreamfusion_fast.guidance.creation import create_guidance
from dreamfusion_fast.rendering import RenderOutput
from dreamfusion_fast.rendering.shading import Shading
from dreamfusion_fast.training.checkpoint import Checkpoint, flatten_optimizer, restore_optimizer, restoring
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.firm import firm_field
from dreamfusion_fast.training.losses import LOSSES, RenderedViews, regularisers, render_options
from dreamfusion_fast.training.memory_plan import MemoryLimit, MemoryPlan, MemoryPlanner
from dreamfusion_fast.training.optimizer_step import CapturedStep
from dreamfusion_fast.training.profile import StepProfiler
from dreamfusion_fast.training.ranks import Ranks
from dreamfusion_fast.training.rates import cosine, rated, set_rates
from dreamfusion_fast.training.scenes import make_scene, restore_scene
from dreamfusion_fast.training.view_sampler import DrawnViews, ViewSampler

T = TypeVar("T")

_log = logging.getLogger(__name__)

_AFTER_NAN = "lower --optim.lr-table or a loss weight and resume from the last checkpoint"


@dataclass(frozen=True)
class StepResult:
    """The outcome of one step. The losses are 0-dim tensors on the device: reading one waits for it.

    Attributes:
        step: steps done so far.
        losses: name -> value before its weight; "sds" is the root mean square of the distillation's residual, which
            for score distillation is eps_hat - eps, and "method" the loss of a guidance that trains something.
        shading: how the views were shaded.
        size: height and width of the views, pixels.
        samples: points at which this process evaluated the field for the images; a 0-dim tensor in a CUDA graph.
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
        profiler: measures each step.
        ranks: processes that render the views of a step together; None: this one alone.

    Everything random comes from one CPU generator seeded by `config.seed`, so the same seed gives the same numbers on
    every device up to rounding, and on a CPU the same mesh.

    Where a step runs out of memory, the trainer logs it, takes the next rung down of `planner.ladder`, and
    repeats the step with the same random numbers: the run goes on as if nothing had happened, up to rounding.

    Raises:
        UserError: a setting that no run can start with, or weights of the guidance that cannot fit into memory; several
            processes with fewer views than that, or with a guidance that trains something.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        guidance: Guidance | None = None,
        profiler: StepProfiler | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        config.check()
        self._ranks = ranks
        self.device = device
        self.profiler = profiler
        limit = MemoryLimit.of(config.memory, device)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.scene = make_scene(config, device, self.generator)
        self.guidance = create_guidance(config.guidance, device) if guidance is None else guidance
        group = self.guidance.views_per_group
        # Said once, so that a run that is resumed on another device goes on with as many views.
        self.config = config = replace(config, batch=config.batch_on(device, group))
        self.batch = config.batch_on(device)
        self._own = slice(0, self.batch) if ranks is None else ranks.views(self.batch)
        own_views = self._own.stop - self._own.start
        if own_views % group:
            whose = "batch" if own_views == self.batch else "views of each process"
            raise UserError(
                f"{whose}: got {own_views}, want a multiple of {group}: {self.guidance.name} reads so many views "
                "together"
            )
        self._sampler = ViewSampler(config, device, self.generator, self._own, group)
        self.optimizer = self._make_optimizer()
        if ranks is not None and self._guidance_parameters:
            raise UserError(
                f"guidance {self.guidance.name!r} trains something, which only one process can: omit torchrun"
            )
        self._optimizer_step = CapturedStep(self.optimizer, device)
        self.planner = MemoryPlanner(
            self.guidance,
            config.renderer,
            own_views,
            max(config.schedule.render_size_start, config.schedule.render_size),
            sum(p.numel() * p.element_size() for group in self.optimizer.param_groups for p in group["params"]),
            limit,
            device,
        )
        self._set(self.planner.choose())
        self.embeddings = self.guidance.embed(config.prompt)
        self.steps_done = 0
        self.firmed = False  # whether the last stage is done

    def _make_optimizer(self) -> torch.optim.Adam:
        c = self.config.optim
        groups = rated(self.scene.parameter_groups(), c)
        own = self.guidance.parameter_groups()
        self._guidance_parameters = [parameter for group in own for parameter in group["params"]]
        groups += own
        return torch.optim.Adam(groups, lr=c.lr_mlp, betas=c.betas, eps=c.eps, fused=True)

    def follow(self, plan: MemoryPlan) -> None:
        """Set renderer and guidance as a plan of `planner.ladder` says, and give back memory that it has no use for."""
        self._set(plan)
        self.guidance.free_graphs()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _set(self, plan: MemoryPlan) -> None:
        self.plan = plan
        self.scene.render_by(plan.renderer_config(self.config.renderer))
        self.guidance.set_recompute(plan.recompute)
        self.guidance.set_offload(plan.offload)

    def step(self) -> StepResult:
        """One optimiser step on `batch` random views. Where it raises, nothing has changed since the last step.

        Raises:
            NonFiniteError: images, losses or gradients hold a NaN or an infinity.
            DoesNotFitError: out of memory, and there is nothing left to save.
        """
        return self._fitting(self._step_or_undo, f"in step {self.steps_done + 1}", self._one_below)

    def load_guidance(self) -> None:
        """Load the guidance's weights now and not in the first step.

        Where memory runs out, it is done again on the next rung down on which fewer of them are on the device.

        Raises:
            DoesNotFitError: out of memory, and no rung is left on which fewer are.
        """

        def fewer_weights() -> MemoryPlan | None:
            weights, plan = self.planner.parts(self.plan)["weights"], self._one_below()
            while plan is not None and self.planner.parts(plan)["weights"] >= weights:
                plan = self.planner.below(plan)
            return plan

        when = f"while the weights of guidance {self.guidance.name!r} were loaded"
        self._fitting(self.guidance.load, when, fewer_weights)

    def _one_below(self) -> MemoryPlan | None:
        return self.planner.below(self.plan)

    def _fitting(self, action: Callable[[], T], when: str, below: Callable[[], MemoryPlan | None]) -> T:
        """Return the result of `action`. Where memory runs out, repeat it with the plan that `below` returns.

        Args:
            action: has to leave everything unchanged where it raises.
            when: the moment at which it runs, for messages.

        Raises:
            DoesNotFitError: out of memory, and `below` has no plan.
        """
        while True:
            try:
                return action()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = what_was_wanted(error)
            # Memory is freed here, since the error's traceback holds all that the action had made.
            plan = below()
            if plan is None:
                raise DoesNotFitError(
                    f"out of memory {when} ({reason}), and nothing is left to save: {self.planner.advice(self.plan)}"
                )
            saved = ", ".join(plan.savings(self.batch, self.plan))
            _log.warning("out of memory %s (%s); from here on %s", when, reason, saved)
            self.follow(plan)

    def _step_or_undo(self) -> StepResult:
        """One step. Where it raises, all that a checkpoint holds is as it was before."""
        step, occupancy = self.steps_done, self.scene.occupancy
        size = self.config.schedule.size(step / self.config.steps)
        draws = self.generator.get_state()
        kept = (occupancy.grid, occupancy.bitfield) if step % occupancy.every == 0 else ()
        before = [buffer.clone() for buffer in kept]
        try:
            with nullcontext() if self.profiler is None else self.profiler.step(size, self.batch):
                return self._step(size)
        except BaseException:
            if self.steps_done == step:  # else it is done, and what raised is the profiler
                self.optimizer.zero_grad(set_to_none=True)
                self.generator.set_state(draws)
                for buffer, value in zip(kept, before, strict=True):
                    buffer.copy_(value)
            raise

    def _step(self, size: int) -> StepResult:
        config, progress = self.config, self.steps_done / self.config.steps
        self._set_learning_rates(progress)
        if self.steps_done % self.scene.occupancy.every == 0:
            with stage("occupancy"):
                self.scene.occupancy.update(self.scene.field, self.steps_done)
        weights = {name: getattr(config.loss, name).at(progress) for name in LOSSES}
        with stage("cameras"):
            drawn = self._sampler.draw(size, progress, self.scene.renderer)
        with stage("render forward"):
            output = self._render_training(drawn, render_options(weights))
            images = output.color.view(self.batch, size, size, 3)[self._own].permute(0, 3, 1, 2)
        with stage("guidance"):
            request = GuidanceRequest(
                images,
                self.embeddings,
                drawn.views[self._own],
                t_range=config.schedule.t_range(progress),
                generator=self.generator,
                sds_share=config.schedule.sds_share.at(progress),
                views_per_call=self.plan.views_per_call,
                progress=progress,
                first_view=self._own.start,
                batch=self.batch,
            )
            pull = self.guidance.gradient(request)

        values = regularisers(RenderedViews(output, self.batch, size, config.opaque, self._own), weights)
        share = len(images) / self.batch
        losses = {"sds": pull.residual.mean() * share} | {name: value.detach() for name, value in values.items()}
        if pull.loss is not None:
            losses["method"] = pull.loss
        # The guidance's gradient is a sum over its pixels; per pixel it has one size whatever the model's resolution.
        per_pixel = 1.0 / (self.batch * self.guidance.image_size**2)
        weighted = [weights[name] * value for name, value in values.items() if weights[name]]
        result = StepResult(self.steps_done + 1, losses, drawn.shading, size, output.samples)
        total = None
        if self.device.type == "cpu":  # before the parameters are touched; on a GPU it would wait
            total = (images.detach() * pull.gradient).sum() * per_pixel + sum(term.detach() for term in weighted)
            if self._ranks is None:
                self.check_finite(result, total)
        self._optimizer_step.prepare()
        self.optimizer.zero_grad(set_to_none=True)
        with stage("render backward"):
            torch.autograd.backward([images, *weighted], [pull.gradient * per_pixel, *(None for _ in weighted)])
        for parameter, gradient in zip(self._guidance_parameters, pull.parameter_gradients, strict=True):
            parameter.grad = gradient
        if self._ranks is not None:
            with stage("sum over processes"):
                result = self._summed(self._ranks, result, total)
        with stage("optimiser"):
            self._optimizer_step()
        self.steps_done += 1
        self.firmed = False
        return result

    def _summed(self, ranks: Ranks, result: StepResult, total: Tensor | None) -> StepResult:
        """Gradients and losses of all processes, in place of this one's; where they raise, all processes do."""
        for parameter in self.scene.field.parameters():
            if parameter.requires_grad and parameter.grad is None:  # no ray of this process met anything
                parameter.grad = torch.zeros_like(parameter)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        numbers = [*result.losses.values(), *([] if total is None else [total])]
        sums = ranks.sum(gradients, numbers)
        losses = dict(zip(result.losses, sums, strict=False))
        summed = StepResult(result.step, losses, result.shading, result.size, result.samples)
        if total is not None:
            self.check_finite(summed, sums[-1])
        return summed

    def firm(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """The last stage, once all steps are done (`firm_field`); whether it was done to its end.

        Args:
            stop: asked after each of its steps; where it says so, the field is left as it was.

        Raises:
            NonFiniteError: the field did not stay finite; it is left as it was.
            DoesNotFitError: out of memory, and there is nothing left to save; the field is left as it was.
        """
        self.firmed = self._fitting(
            lambda: firm_field(self.scene, self.config, stop), "in the last stage", self._one_below
        )
        return self.firmed

    def check_finite(self, result: StepResult, total: Tensor | None = None) -> None:
        """Raise NonFiniteError if a loss of `result`, or their weighted sum, is not finite; waits for the GPU."""
        sums = {} if total is None else {"total": total}
        for name, value in (result.losses | sums).items():
            if not math.isfinite(float(value)):
                raise NonFiniteError(f"the {name} loss became {float(value)} at step {result.step}: {_AFTER_NAN}")

    def check_parameters(self) -> None:
        """Raise NonFiniteError if a parameter is not finite; waits for the GPU."""
        when = f"after step {self.steps_done}"
        self.scene.check_parameters(when, f": {_AFTER_NAN}")
        if not all(parameter.detach().isfinite().all() for parameter in self._guidance_parameters):
            raise NonFiniteError(
                f"the parameters of {self.guidance.name} hold a NaN or an infinity {when}: {_AFTER_NAN}"
            )

    def _set_learning_rates(self, progress: float) -> None:
        c = self.config.optim
        warm = min(1.0, (self.steps_done + 1) / max(c.warmup_steps, 1))
        set_rates(self.optimizer, warm * cosine(progress, c.final_lr_factor))  # those of the scene, not of the guidance

    def _render_training(self, drawn: DrawnViews, options: dict[str, Any]) -> RenderOutput:
        return self.scene.renderer.render(
            drawn.prepared,
            self.scene.background if drawn.plain is None else drawn.plain,
            drawn.shading,
            drawn.light,
            ambient=self.config.shading.ambient,
            diffuse=self.config.shading.diffuse,
            **options,
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Tensors and JSON values from which `restore` continues this run exactly."""
        tensors = {"generator": self.generator.get_state(), **self.scene.state()}
        tensors |= {f"guidance.{name}": value for name, value in self.guidance.state().items()}
        moments, rest = flatten_optimizer(self.optimizer)
        meta: dict[str, object]
        meta = {"optimizer": rest, "guidance_revision": self.guidance.revision, "firmed": self.firmed}
        meta["guidance_files"] = dict(self.guidance.files)
        return tensors | moments, meta

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` was written, by a config of this architecture (`load_checkpoint` checks it).

        Raises:
            UserError: it lacks something, or something in it has another shape.
        """
        restore_scene(self.scene, checkpoint)
        with restoring():
            self.guidance.load_state(checkpoint.group("guidance"))
            restore_optimizer(self.optimizer, checkpoint.tensors, checkpoint.meta["optimizer"])
            self.generator.set_state(checkpoint.tensors["generator"])
        self.steps_done = checkpoint.step
        self.firmed = bool(checkpoint.meta.get("firmed", False))
