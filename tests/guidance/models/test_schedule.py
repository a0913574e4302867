"""Noise levels: what is made noisy is found again from any kind of output."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from dreamfusion_fast.guidance.methods import (
    ClassifierScoreDistillation,
    Combination,
    Predictions,
    RectifiedFlowDistillation,
    ScoreDistillationSampling,
)
from dreamfusion_fast.guidance.methods.cfg import guided
from dreamfusion_fast.guidance.models.schedule import FlowMatching, VariancePreserving

ABAR = torch.tensor([0.999, 0.9, 0.5, 0.1, 0.01], dtype=torch.float64)
KINDS = ["epsilon", "v_prediction", "sample"]


def outputs(x, noise, level):
    return {"epsilon": noise, "v_prediction": level.alpha * noise - level.sigma * x, "sample": x}


@pytest.mark.parametrize("kind", KINDS)
def test_clean_and_noise_of_each_kind_of_output(kind):
    x, noise, other = torch.randn(3, 4, 3, 5, 5, dtype=torch.float64)
    level = VariancePreserving(ABAR, kind).at(torch.tensor([1, 3, 4, 2]), torch.float64)
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones(4, 1, 1, 1, dtype=torch.float64))
    noisy = level.noisy(x, noise)
    output = outputs(x, noise, level)[kind]
    assert torch.equal(level.output(x, noise), output)
    torch.testing.assert_close(level.noise_of_clean(x, noisy), noise)
    torch.testing.assert_close(level.clean(output, noisy), x)
    torch.testing.assert_close(level.noise(output, noisy), noise)
    torch.testing.assert_close(level.error(output, noisy, x, noise), torch.zeros_like(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(level.error(output, noisy, x, other), noise - other if kind != "sample" else 0 * x)
    torch.testing.assert_close(level.error_of_clean(x + level.sigma, x), -level.alpha.expand_as(x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_a_schedule_stay_finite(kind):
    level = VariancePreserving(torch.tensor([1.0, 0.0]), kind).at(torch.tensor([0, 1]), torch.float32)
    ones = torch.ones(2, 3, 2, 2)
    for value in (level.clean(ones, ones), level.noise(ones, ones), level.error_of_clean(ones, 2 * ones)):
        assert value.isfinite().all()


def test_weights():
    level = VariancePreserving(ABAR, "epsilon").at(torch.tensor([2]), torch.float64)
    assert level.weight("sds").item() == pytest.approx(0.5)
    assert level.weight("uniform").item() == 1
    assert level.weight("fantasia3d").item() == pytest.approx(0.5**1.5)
    assert level.weight("ism").item() == pytest.approx(1)
    with pytest.raises(ValueError, match="'dreamtime', want one that depends on the noise level alone"):
        level.weight("dreamtime")


def test_a_flow():
    sigmas = torch.tensor([0.02, 0.3, 0.9, 1.0], dtype=torch.float64)
    x, noise, other = torch.randn(3, 4, 3, 5, 5, dtype=torch.float64)
    schedule = FlowMatching(sigmas)
    assert schedule.steps == 4
    level = schedule.at(torch.arange(4), torch.float64)
    assert torch.equal(level.sigma.flatten(), sigmas)
    torch.testing.assert_close(level.alpha + level.sigma, torch.ones(4, 1, 1, 1, dtype=torch.float64))
    noisy, output = level.noisy(x, noise), noise - x
    torch.testing.assert_close(level.clean(output, noisy), x)
    torch.testing.assert_close(level.noise(output, noisy), noise)
    torch.testing.assert_close(level.error(output, noisy, x, noise), torch.zeros_like(x))
    # A velocity that means the noise `other` and the same noisy input.
    output = (other - noisy) / level.alpha.clamp_min(1e-9)
    torch.testing.assert_close(level.error(output, noisy, x, noise)[:-1], (other - noise)[:-1])
    torch.testing.assert_close(level.error(output, noisy, x, noise), level.noise(output, noisy) - noise)
    torch.testing.assert_close(
        level.alpha * level.velocity_error(output, x, noise), (other - noise) * (level.alpha > 0)
    )
    torch.testing.assert_close(level.error_of_clean(x + level.sigma, x), -level.alpha.expand_as(x))


def test_the_methods_of_a_flow():
    generator = torch.Generator().manual_seed(0)
    x, noise, null, text = torch.randn(4, 2, 3, 3, 3, dtype=torch.float64, generator=generator)
    level = FlowMatching(torch.tensor([0.1, 0.6], dtype=torch.float64)).at(torch.arange(2), torch.float64)
    nobody = Mock()
    given = {"null": null, "text": text}
    p = Predictions(
        nobody, nobody, nobody, nobody, x, noise, level.noisy(x, noise), level, Combination(7.0), outputs=given
    )
    velocity = null + 7.0 * (text - null)
    rfds = RectifiedFlowDistillation().residual(p)
    torch.testing.assert_close(rfds, velocity - noise + x)
    torch.testing.assert_close(ScoreDistillationSampling().residual(p), level.alpha * rfds)
    torch.testing.assert_close(ClassifierScoreDistillation().residual(p), level.alpha * 7.0 * (text - null))


def test_an_unknown_prediction_is_named():
    with pytest.raises(ValueError, match="prediction_type: got 'flow', want one of epsilon, v_prediction, sample"):
        VariancePreserving(ABAR, "flow")


def test_guidance_of_two_outputs():
    null, text = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]])
    assert guided(null, text, 10.0).tolist() == [[21.0], [32.0]]
    assert guided(null, text, 10.0, "text").tolist() == [[23.0], [35.0]]


@pytest.mark.parametrize("kind", KINDS)
def test_methods_say_the_same_for_every_kind_of_output(kind):
    generator = torch.Generator().manual_seed(0)
    x, noise, null, text = torch.randn(4, 2, 3, 3, 3, dtype=torch.float64, generator=generator)
    level = VariancePreserving(ABAR, kind).at(torch.tensor([2, 3]), torch.float64)
    noisy = level.noisy(x, noise)

    def said(eps):
        """The output of this kind that means the noise `eps`."""
        return outputs((noisy - level.sigma * eps) / level.alpha, eps, level)[kind]

    given = {"null": said(null), "text": said(text)}
    nobody = Mock()
    p = Predictions(nobody, nobody, nobody, nobody, x, noise, noisy, level, Combination(7.0), outputs=given)
    torch.testing.assert_close(ScoreDistillationSampling().residual(p), null + 7.0 * (text - null) - noise)
    torch.testing.assert_close(ClassifierScoreDistillation().residual(p), 7.0 * (text - null))
    x0 = level.clean(ScoreDistillationSampling().guided(p), noisy)
    torch.testing.assert_close(x0, (noisy - level.sigma * (null + 7.0 * (text - null))) / level.alpha)
