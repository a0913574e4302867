"""With the reference backend, training needs no native core."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fakes import BallGuidance, small_config

from dreamfusion_fast.ops import _native
from dreamfusion_fast.training.sections import FirmConfig
from dreamfusion_fast.training.trainer import Trainer


@pytest.mark.slow
def test_steps_and_last_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *_: Any) -> None:
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(_native, "function_of", refuse)
    config = small_config(firm=FirmConfig(steps=3))
    with pytest.raises(AssertionError, match="was called"):  # or nothing is shown
        Trainer(config, torch.device("cpu"), BallGuidance()).step()
    backend: Any = {"backend": "reference"}
    config = replace(config, field=replace(config.field, **backend), renderer=replace(config.renderer, **backend))
    trainer = Trainer(config, torch.device("cpu"), BallGuidance())
    for _ in range(2):
        trainer.step()
    assert trainer.firm()
