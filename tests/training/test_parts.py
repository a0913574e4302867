"""A batch in parts: the numbers of the whole batch, whatever the parts."""

from __future__ import annotations

import pytest
import torch
from fakes import BallGuidance
from noisy import NoisyGuidance, TinyLatentModel

from dreamfusion_fast.guidance.config import GuidanceConfig
from dreamfusion_fast.guidance.contract import Views
from dreamfusion_fast.guidance.distillation import ScoreDistillation
from dreamfusion_fast.training.parts import sds_gradient_in_parts

BATCH = 5


def views_of(background):
    angle = torch.linspace(-2.0, 2.0, BATCH)
    return Views(angle, 0.1 * angle, torch.rand(BATCH, 3) if background else None, "textureless")


def run(guidance, views_per_call, background=True):
    torch.manual_seed(3)
    images = torch.rand(BATCH, 3, 16, 16, requires_grad=True)
    views, generator = views_of(background), torch.Generator().manual_seed(7)
    output = sds_gradient_in_parts(
        guidance, images, guidance.embed("x"), views, views_per_call, t_range=(0.2, 0.8), generator=generator
    )
    return output, generator.get_state()


@pytest.mark.parametrize("views_per_call", [1, 2, 3, 4])
@pytest.mark.parametrize("background", [True, False])
def test_parts_are_the_whole(views_per_call, background):
    whole, state = run(NoisyGuidance(), BATCH, background)
    guidance = NoisyGuidance()
    parts, state_after = run(guidance, views_per_call, background)
    assert max(guidance.sizes) == views_per_call
    assert sum(guidance.sizes) == BATCH
    for name, value in whole._asdict().items():
        assert torch.equal(value, getattr(parts, name)), name
    assert torch.equal(state, state_after)


@pytest.mark.parametrize("views_per_call", [1, 2, 4])
def test_score_distillation_in_parts_is_the_whole(views_per_call):
    config = GuidanceConfig(cache=False)
    whole, state = run(ScoreDistillation(TinyLatentModel(), config), BATCH)
    parts, state_after = run(ScoreDistillation(TinyLatentModel(), config), views_per_call)
    assert torch.equal(whole.t, parts.t)
    assert torch.equal(state, state_after)
    for name in ("gradient", "norm", "residual", "x0"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-6)


def test_no_views_at_a_time_is_refused():
    with pytest.raises(ValueError, match="views_per_call: got 0, want at least 1"):
        run(BallGuidance(), 0)
