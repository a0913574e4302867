"""How a run fits into memory: what it may use, what it is expected to need, and what it gives up to need less.

What can be given up is a ladder. The plan starts on the first rung whose estimate fits; where memory runs out all the
same, the trainer steps down from there. Rungs change what is held at a time, not what is computed. docs/memory.md says
what each of them costs.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.gpu.memory import free_bytes, limited
from dreamfusion_fast.guidance.contract import Guidance
from dreamfusion_fast.rendering.config import RendererConfig
from dreamfusion_fast.rendering.volume.workspace import default_budget

_UNITS = {"": 1, "B": 1} | {f"{letter}B": 1000**k for k, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}IB": 1024**k for k, letter in enumerate("KMGT", 1)}
# A render's workspace where memory is short: tiles are then of some 10^5 samples, which still fill a GPU.
SMALL_BUDGET = 16 << 20
# Of what a run may use, this share is left free: estimates are rough, and the allocator cannot use every gap.
_LEFT_FREE = 0.05
# Held per ray of a step: rays, lights and backgrounds 72 bytes, those of the two steps drawn ahead of it 96, sums and
# their gradients 88, images with gradients and the terms of the losses some 160; and a fifth more.
_BYTES_PER_RAY = 500
# Parameters are held with their gradients and Adam's two moments; what is rendered may have a copy in 16 bits.
_COPIES_OF_PARAMETERS = 4.5


def parse_memory(memory: str | int) -> int:
    """Bytes of "16GB" (10^9), "16GiB" (2^30), "16000MB" or plain bytes, as text or number. UserError for all else."""
    size = 0
    if isinstance(memory, int) and not isinstance(memory, bool):
        size = memory
    elif isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", memory)
        unit = None if match is None else _UNITS.get(match[2].upper())
        size = 0 if match is None or unit is None else int(float(match[1]) * unit)
    if size < 1:
        raise UserError(f"memory has to be a size such as 16GB, 16GiB, 16000MB or plain bytes above 0, not {memory!r}")
    return size


def shown(size: int) -> str:
    """Bytes for people: "3.1 GB", "16 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 10**9 else f"{size / 1e6:.0f} MB"


@dataclass(frozen=True)
class MemoryLimit:
    """The memory that a run may use.

    Attributes:
        size: bytes; None: nobody knows, or no limit.
        source: where the number is from, for messages.
    """

    size: int | None
    source: str

    @classmethod
    def of(cls, memory: str | int | None, device: torch.device) -> MemoryLimit:
        """The limit of a run that begins now: `memory` if given, and on a GPU never more than is free.

        Raises:
            UserError: `memory` is no size.
        """
        given = None if memory is None else parse_memory(memory)
        if device.type != "cuda":
            return cls(given, "" if given is None else f"--memory {memory}")
        allocated = torch.cuda.memory_allocated(device)
        free = free_bytes(device)
        if given is not None and given - allocated <= free:
            return cls(given - allocated, f"--memory {memory}")
        name = torch.cuda.get_device_name(device)
        return cls(free, f"free on {name}" if given is None else f"free on {name}, less than --memory {memory}")


def capped(memory: str | int | None, device: torch.device) -> AbstractContextManager[None]:
    """Within it, torch's allocations on a GPU fail beyond `memory`, where it is given and less than the card has."""
    if memory is None or device.type != "cuda":
        return nullcontext()
    return limited(device, parse_memory(memory))


@dataclass(frozen=True)
class MemoryPlan:
    """One rung of the ladder: what is held at a time.

    Attributes:
        views_per_call: most views in one call of the guidance.
        render_budget: bytes of a render's workspace; None: the renderer's own default.
        render_graphs: whether the renderer may keep CUDA graphs and their buffers.
        recompute: whether the encoding is computed again in its backward.
        offload: whether the guidance's weights are in main memory while not in use.
    """

    views_per_call: int
    render_budget: int | None = None
    render_graphs: bool = True
    recompute: bool = False
    offload: bool = False

    def renderer_config(self, config: RendererConfig) -> RendererConfig:
        """`config` with the plan's part of it."""
        return replace(config, memory_budget=self.render_budget, graphs=self.render_graphs)

    def savings(self, batch: int, above: MemoryPlan) -> list[str]:
        """The savings of this rung over the rung `above`, in words."""
        words = []
        if (self.render_budget, self.render_graphs) != (above.render_budget, above.render_graphs):
            budget = "" if self.render_budget is None else f" of {shown(self.render_budget)}"
            words.append(f"a render workspace{budget}, kept for no later render")
        if self.views_per_call < above.views_per_call:
            words.append(f"{self.views_per_call} of {batch} views at a time through the guidance")
        if self.recompute and not above.recompute:
            words.append("the encoding recomputed in its backward")
        if self.offload and not above.offload:
            words.append("the guidance's weights brought from main memory in each step")
        return words


class MemoryPlanner:
    """The ladder of one run, and estimates of what a rung needs.

    Args:
        guidance: asked for its needs; see `dreamfusion_fast.guidance.contract.UsesMemory`.
        renderer: the run's settings of it. A budget given there is where the ladder starts.
        batch: views per step.
        render_size: largest height and width rendered in training, pixels.
        parameter_bytes: of everything that is optimised.
        limit: what the run may use.
        device: where it runs.
    """

    def __init__(
        self,
        guidance: Guidance,
        renderer: RendererConfig,
        batch: int,
        render_size: int,
        parameter_bytes: int,
        limit: MemoryLimit,
        device: torch.device,
    ) -> None:
        self.guidance, self.batch, self.render_size, self.limit = guidance, batch, render_size, limit
        self._parameter_bytes = parameter_bytes
        self._default_budget = default_budget(device)
        self.ladder = self._make_ladder(renderer)

    def _make_ladder(self, renderer: RendererConfig) -> list[MemoryPlan]:
        budget = renderer.memory_budget
        if budget is None and self.limit.size is not None:
            budget = max(min(self._default_budget, self.limit.size // 8), 1)
        ladder = [MemoryPlan(self.batch, budget, renderer.graphs)]

        def add(**changes: object) -> None:
            ladder.append(replace(ladder[-1], **changes))  # type: ignore[arg-type]

        if (budget or self._default_budget) > SMALL_BUDGET:
            add(render_budget=SMALL_BUDGET, render_graphs=False)
        elif renderer.graphs:
            add(render_graphs=False)
        group = self.guidance.views_per_group
        groups = self.batch // group
        while groups > 1:
            groups = -(-groups // 2)
            add(views_per_call=groups * group)
        needs = self.guidance.memory_needs(1, self.render_size)
        if needs.encode_recomputed < needs.encode:
            add(recompute=True)
        if needs.offloadable > 0:
            add(offload=True)
        return ladder

    def parts(self, plan: MemoryPlan, batch: int | None = None, render_size: int | None = None) -> dict[str, int]:
        """Estimated bytes by what takes them, all at once: the encoding's activations are held while the U-Net runs."""
        batch, size = batch or self.batch, render_size or self.render_size
        views = min(plan.views_per_call, batch)
        needs = self.guidance.memory_needs(views, size)
        return {
            "weights": needs.weights - (needs.offloadable if plan.offload else 0),
            "encoding": views * (needs.encode_recomputed if plan.recompute else needs.encode),
            "U-Net": views * needs.unet,
            "field and optimiser": int(_COPIES_OF_PARAMETERS * self._parameter_bytes),
            "rays": batch * size * size * _BYTES_PER_RAY,
            "render workspace": plan.render_budget or self._default_budget,
        }

    def expected(self, plan: MemoryPlan, batch: int | None = None, render_size: int | None = None) -> int:
        """Estimated bytes of a run by this plan, or of one with another batch or render size."""
        return sum(self.parts(plan, batch, render_size).values())

    def choose(self) -> MemoryPlan:
        """The first rung whose estimate fits; the last one if none does.

        Raises:
            UserError: not even the guidance's weights fit.
        """
        if self.limit.size is None:
            return self.ladder[0]
        least = self.parts(self.ladder[-1])["weights"]
        if least > self.limit.size:
            raise UserError(
                f"the weights of guidance {self.guidance.name!r} alone take {shown(least)}, and the run may use "
                f"{shown(self.limit.size)} ({self.limit.source}): choose a smaller model with --guidance.name, "
                "fewer bits with --guidance.weights, or allow more with --memory"
            )
        return next((plan for plan in self.ladder if self._fits(self.expected(plan))), self.ladder[-1])

    def _fits(self, size: float) -> bool:
        return self.limit.size is None or size <= (1.0 - _LEFT_FREE) * self.limit.size

    def below(self, plan: MemoryPlan) -> MemoryPlan | None:
        """The next rung down, or None from the last."""
        below = self.ladder[self.ladder.index(plan) + 1 :]
        return below[0] if below else None

    def lines(self, plan: MemoryPlan) -> list[str]:
        """The choice and its reason, for the user; none without a limit."""
        if self.limit.size is None:
            return []
        top = self.ladder[0]
        parts = ", ".join(f"{name} {shown(size)}" for name, size in self.parts(top).items() if size >= 10**6)
        have = f"memory: {shown(self.limit.size)} ({self.limit.source})"
        lines = [f"{have}; the run is expected to take {shown(self.expected(top))}: {parts}"]
        if plan == top:
            return [*lines, "memory plan: it fits, nothing has to be saved"]
        saving = f"memory plan: to need {shown(self.expected(plan))}, {', '.join(plan.savings(self.batch, top))}"
        if not self._fits(self.expected(plan)):
            saving += "; that may still be too much, and is tried"
        return [*lines, saving]

    def advice(self, plan: MemoryPlan) -> str:
        """The settings to change where memory ran out with `plan`, by the same estimate."""
        now = self.expected(plan)
        # What ran out was at least the limit, whatever the estimate said.
        wrong = 1.0 if self.limit.size is None else max(1.0, self.limit.size / now)
        smaller = (self.render_size >> halvings for halvings in range(1, 32))
        for size in (self.render_size, *(size for size in smaller if size >= 32)):
            for batch in dict.fromkeys((self.batch, self.guidance.views_per_group)):
                if (size, batch) == (self.render_size, self.batch):
                    continue
                less = wrong * self.expected(plan, batch, size)
                if less <= 0.9 * wrong * now and self._fits(less):
                    options = [f"--batch {batch}"] if batch != self.batch else []
                    options += [f"--schedule.render-size {size}"] if size != self.render_size else []
                    sizes = f"{shown(int(less))} in place of {shown(int(wrong * now))}"
                    return f"{' '.join(options)} would fit by estimate ({sizes})"
        return "use a smaller model (--guidance.name), --device cpu, or a GPU with more memory free"
