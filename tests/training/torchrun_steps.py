"""Run by torchrun: some steps of a small run, and what each process has then and has been given."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from fakes import small_config, use_prior

from dreamfusion_fast.rendering.shading import Shading
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.ranks import joined_ranks
from dreamfusion_fast.training.sections import BackgroundConfig, LossConfig, Ramp
from dreamfusion_fast.training.trainer import Trainer

STEPS = 10


def config(batch: int = 3) -> Config:
    """All losses have a weight, so that none of them can be wrong."""
    ramp = Ramp(0.05, 0.05)
    losses = LossConfig(ramp, ramp, ramp, ramp, ramp, ramp)
    return small_config(batch=batch, loss=losses, background=BackgroundConfig(plain=0.5, frequencies=2, hidden=8))


def result(trainer: Trainer) -> dict[str, object]:
    """The losses of `STEPS` steps and the state after them."""
    losses, shadings = [], set[Shading]()
    for _ in range(STEPS):
        step = trainer.step()
        losses.append({name: float(value) for name, value in step.losses.items()})
        shadings.add(step.shading)
    return {"losses": losses, "state": trainer.state()[0], "shadings": len(shadings)}


def main(out: str, prior: str) -> None:
    use_prior(Path(prior))
    torch.set_num_threads(1)
    with joined_ranks("cpu") as ranks:
        parameter = torch.nn.Parameter(torch.full((3, 2), float(ranks.rank + 5)))
        ranks.share([parameter])
        made = result(Trainer(config(), torch.device("cpu"), ranks=ranks))
        torch.save(made | {"shared": parameter.detach()}, Path(out) / f"{ranks.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
