"""Interval Score Matching (LucidDreamer, Liang et al. 2023, arXiv 2311.11284)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from torch import Tensor

from dreamfusion_fast.guidance.methods.inversion import invert, step_to
from dreamfusion_fast.guidance.methods.method import Method, Predictions
from dreamfusion_fast.guidance.models.schedule import Weighting
from dreamfusion_fast.settings import Range, Settings


@dataclass(frozen=True)
class IsmConfig(Settings):
    """Mode ism: its two intervals. Defaults are the paper's, 50 and 200 of 1000 timesteps."""

    delta_t: Annotated[float, Range(0, 1, open="low")] = 0.05
    """The interval between the two noise levels that are compared, share of the schedule."""
    delta_s: Annotated[float, Range(0, 1, open="low")] = 0.2
    """Stride of the inversion to the first of them, share of the schedule: the smaller, the more steps."""


class IntervalScoreMatching(Method):
    """eps_hat(x_t, t, text) - eps(x_s, s, null), s = t - delta_t: the text against the way that led there.

    x_s is found from the render by DDIM inversion without the prompt in steps of delta_s, and x_t from x_s by one more
    such step. The inversion begins at timestep 0, with the noise that was drawn at that level, as in the authors' code.
    Their w(t) is sigma_t / alpha_t.

    Args:
        config: of the intervals.
    """

    guidance_scale = 7.5
    weighting: Weighting = "ism"

    def __init__(self, config: IsmConfig | None = None) -> None:
        super().__init__()
        self.config = config or IsmConfig()

    def prepare(self, predictions: Predictions) -> Predictions:
        """See `Method.prepare`: x_t by inversion, and the prediction at x_s to compare with."""
        p, steps = predictions, predictions.model.schedule.steps
        interval, stride = (max(round(share * steps), 1) for share in (self.config.delta_t, self.config.delta_s))

        def ask(noisy: Tensor, t: Tensor) -> Tensor:
            return p.predict(("null",), noisy, t)["null"]

        s = (p.t - interval).clamp_min(0)
        first = p.model.schedule.at(p.t.clamp_max(0), p.clean.dtype).noisy(p.clean, p.noise)
        at_s = invert(p, first, s, max(p.t_most - interval, 0), stride, ask)
        output = ask(at_s, s)
        noisy = step_to(p, at_s, s, p.t, output)
        return replace(
            p,
            noise=p.level.noise_of_clean(p.clean, noisy),
            noisy=noisy,
            reference=p.model.schedule.at(s, p.clean.dtype).noise(output, at_s),
            outputs={},
        )

    def residual(self, predictions: Predictions) -> Tensor:
        """See `Method.residual`."""
        return self.error(predictions)
