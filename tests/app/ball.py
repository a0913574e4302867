"""The command line, with a guidance that wants a ball and small settings.

Steps are slow enough to be watched until there is a file called "go" in the run's folder.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from fakes import BallGuidance, small_config

from dreamfusion_fast import cli
from dreamfusion_fast.training import trainer
from dreamfusion_fast.training.config import Config

STEP = 0.5  # seconds


GO = Path(sys.argv[sys.argv.index("--resume" if "--resume" in sys.argv else "--out") + 1]) / "go"


class SlowBall(BallGuidance):
    def gradient(self, request: Any) -> Any:
        if not GO.exists():
            time.sleep(STEP)
        return super().gradient(request)


def small(config: Config) -> Config:
    """A run of a second for the prompt, seed, steps and files of `config`."""
    kept = {name: getattr(config, name) for name in ("prompt", "out", "seed", "steps", "log", "guidance")}
    return small_config(**kept)


if __name__ == "__main__":
    torch.set_num_threads(1)
    load = Config.load
    Config.load = classmethod(lambda cls, path, **options: small(load(path, **options)))  # type: ignore[method-assign, assignment]
    trainer.create_guidance = lambda config, device: SlowBall()  # type: ignore[assignment]
    sys.exit(cli.main())
