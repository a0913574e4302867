"""Guidance for runs in Ray's workers, which import this file: what it does is said by the negative prompt."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from fakes import BallGuidance

from dreamfusion_fast.guidance.config import GuidanceConfig
from dreamfusion_fast.guidance.contract import Guidance, GuidanceOutput

_CALLS_BEFORE = 3


class KillingGuidance(BallGuidance):
    """Kills its process in the fourth step: always, or only if `once` is not there yet, which it makes then."""

    def __init__(self, once: Path | None) -> None:
        super().__init__()
        self.once = once

    def gradient(self, request: Any) -> GuidanceOutput:
        if len(self.calls) == _CALLS_BEFORE and (self.once is None or not self.once.exists()):
            if self.once is not None:
                self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().gradient(request)


class WaitingGuidance(BallGuidance):
    """Waits in its first step until a file is there, a minute at most."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def gradient(self, request: Any) -> GuidanceOutput:
        for _ in range(600 if not self.calls else 0):
            if self.file.exists():
                break
            time.sleep(0.1)
        return super().gradient(request)


def create(config: GuidanceConfig, device: torch.device) -> Guidance:
    """A guidance as the negative prompt says: "", "nan", "kill", "kill once FILE", "wait FILE"."""
    match config.negative_prompt.split():
        case ["nan"]:
            return BallGuidance(nan_at=1)
        case ["kill"]:
            return KillingGuidance(None)
        case ["kill", "once", file]:
            return KillingGuidance(Path(file))
        case ["wait", file]:
            return WaitingGuidance(Path(file))
    return BallGuidance()
