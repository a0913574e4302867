"""The loop that the trainings share: a schedule by steps or by the clock, cut and resumed anywhere."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARMUP_STEPS = 200
EMA_DECAY = 0.9995
REPORT_EVERY = 500

StepLoss = Callable[[int], tuple[Tensor, Tensor, Tensor]]
"""Step number -> loss to go down, and sums `[k]` and counts `[k]` whose quotients are reported."""


def seed_step(seed: int, stream: int, step: int) -> None:
    """Make the random numbers that follow a function of these three, whatever ran before."""
    torch.manual_seed(((seed * 8 + stream) << 32) + step)


@dataclasses.dataclass
class Phase:
    """One training, from its first step to its last, over as many calls as it takes.

    Args:
        name: for messages and the log.
        stream: of its random numbers.
        peak_rate: of the learning rate, after `WARMUP_STEPS` and before the cosine to zero.
        steps: its length in steps, or None:
        seconds: its length by the clock. The first step of a call, which compiles, does not count.
        step, elapsed: how far it is.
    """

    name: str
    stream: int
    peak_rate: float
    steps: int | None
    seconds: float
    step: int = 0
    elapsed: float = 0.0

    @property
    def progress(self) -> float:
        """0 to 1; at 1 it is done."""
        done = self.step / self.steps if self.steps is not None else self.elapsed / self.seconds
        return min(1.0, done)

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        warmup = min(1.0, (self.step + 1) / WARMUP_STEPS)
        return self.peak_rate * warmup * 0.5 * (1 + math.cos(math.pi * self.progress))


@dataclasses.dataclass
class Call:
    """The limits of one call of the script.

    Args:
        started, deadline: `time.monotonic()` seconds.
        steps: most steps of all phases together.
    """

    started: float
    deadline: float
    steps: int = 10**12

    @property
    def over(self) -> bool:
        return self.steps <= 0 or time.monotonic() >= self.deadline

    def say(self, message: str) -> None:
        print(f"{time.monotonic() - self.started:6.1f} s  {message}", flush=True)


class Report:
    """Means since the last line, printed and logged.

    Args:
        columns: names of the k quotients.
        log: list that lines are added to.
    """

    def __init__(self, phase: Phase, call: Call, columns: tuple[str, ...], log: list[dict[str, Any]]) -> None:
        self._phase, self._call, self._columns, self._log = phase, call, columns, log
        self._totals: Tensor | None = None
        self._first, self._since = phase.step, (phase.step, time.monotonic())

    def add(self, sums: Tensor, counts: Tensor) -> None:
        """Add one step, and print where it is time; never waits for the device otherwise."""
        pair = torch.stack((sums, counts))
        self._totals = pair if self._totals is None else self._totals + pair
        if self._phase.step - self._first in (1, 20) or self._phase.step % REPORT_EVERY == 0:
            self.flush()

    def flush(self) -> None:
        """Print what has gathered.

        Raises:
            SystemExit: it is not finite.
        """
        if self._totals is None:
            return
        values = (self._totals[0] / self._totals[1].clamp(min=1)).tolist()
        step, now = self._phase.step, time.monotonic()
        speed = (step - self._since[0]) / max(now - self._since[1], 1e-9)
        line = "  ".join(f"{name} {value:.4f}" for name, value in zip(self._columns, values, strict=True))
        self._call.say(f"{self._phase.name} step {step}  {speed:.1f} steps/s  rate {self._phase.rate:.1e}  {line}")
        if not all(map(math.isfinite, values)):
            raise SystemExit(f"{self._phase.name}: the loss is not finite at step {step}; nothing was written")
        self._log.append({"phase": self._phase.name, "step": step} | dict(zip(self._columns, values, strict=True)))
        self._totals, self._since = None, (step, now)


def run(
    phase: Phase,
    step_loss: StepLoss,
    parameters: list[Tensor],
    optimizer: torch.optim.Optimizer,
    call: Call,
    report: Report,
    average: list[Tensor] | None = None,
    save_every: int | None = None,
    save: Callable[[], None] | None = None,
) -> None:
    """Train until the phase is done or the call is over.

    Args:
        average: exponential moving average of the parameters, followed in place.
        save_every, save: call `save` whenever the phase's step is a multiple of this.
    """
    last: float | None = None
    while phase.progress < 1 and not call.over:
        for group in optimizer.param_groups:
            group["lr"] = phase.rate
        loss, sums, counts = step_loss(phase.step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        phase.step += 1
        call.steps -= 1
        if average is not None:
            decay = min(EMA_DECAY, (1 + phase.step) / (10 + phase.step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        if last is None and loss.is_cuda:
            torch.cuda.synchronize()
        now = time.monotonic()
        phase.elapsed += 0.0 if last is None else now - last
        last = now
        report.add(sums, counts)
        if save is not None and save_every and phase.step % save_every == 0:
            report.flush()
            save()
    report.flush()
