"""The last stage: renders become opaque or empty, and stay those of the same object."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fakes import BallGuidance, small_config

from dreamfusion_fast.errors import NonFiniteError
from dreamfusion_fast.rendering.orbits import orbit_cameras
from dreamfusion_fast.training.opaque import OpaqueThresholds
from dreamfusion_fast.training.sections import FirmConfig
from dreamfusion_fast.training.trainer import Trainer

CPU = torch.device("cpu")


def trainer_of(device=CPU, threshold=0.5, **firm):
    """A field as it begins: a blob that is dense inside and fades outwards over a third of its radius."""
    opaque = OpaqueThresholds(threshold, threshold)
    trainer = Trainer(small_config(firm=FirmConfig(**firm), opaque=opaque), device, BallGuidance())
    trainer.scene.occupancy.update(trainer.scene.field, 0)
    return trainer


@torch.no_grad()
def look(trainer):
    device = trainer.device
    output = trainer.scene.renderer.render(orbit_cameras(3, device=device).rays(32, 32))
    return output.opacity.cpu(), output.color.cpu()


def soft(opacity):
    return float(((opacity > 0.1) & (opacity < 0.9)).sum())


@pytest.mark.quick(2)
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_edges_become_hard_where_they_pass_the_threshold(device, threshold):
    trainer = trainer_of(device, threshold, steps=60, lr_table=0.05, lr_mlp=0.01)
    before, color_before = look(trainer)
    assert trainer.firm()
    after, color_after = look(trainer)
    wanted, got = before > threshold, after > 0.5
    assert soft(before) > 100, "nothing to make firm"
    assert soft(after) < 0.6 * soft(before)
    assert float((wanted & got).sum() / (wanted | got).sum()) > 0.85
    inside = (before > 0.95) & (after > 0.95)
    torch.testing.assert_close(color_after[inside], color_before[inside], atol=0.1, rtol=0)


def test_same_seed_same_bits_and_another_seed_others():
    tables = []
    for seed in (0, 0, 1):
        trainer = trainer_of(steps=3)
        trainer.config = dataclasses.replace(trainer.config, seed=seed)
        trainer.firm()
        tables.append(trainer.scene.field.table.detach().clone())
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def state_of(trainer):
    return {name: value.clone() for name, value in trainer.state()[0].items()}


def test_stopped_it_leaves_everything_as_it_was():
    trainer = trainer_of(steps=20)
    before = state_of(trainer)
    asked = []
    assert not trainer.firm(lambda: asked.append(1) or len(asked) == 5)
    assert len(asked) == 5
    assert not trainer.firmed
    after = state_of(trainer)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_nan_leaves_everything_as_it_was():
    trainer = trainer_of(steps=2, lr_table=1e39)
    before = state_of(trainer)
    with pytest.raises(NonFiniteError, match=r"field\.table"):
        trainer.firm()
    after = state_of(trainer)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_step_of_training_undoes_that_it_is_firm():
    trainer = trainer_of(steps=1)
    trainer.firm()
    assert trainer.firmed
    trainer.step()
    assert not trainer.firmed


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="steps: got -1, want at least 0"):
        FirmConfig(steps=-1)
