"""States of trainings as files: parts, older sets, and moments that are rounded where they are saved."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import training_state


@pytest.mark.parametrize("length", [1, 99, 100, 101, 1000])
def test_state_in_parts(tmp_path: Path, length: int) -> None:
    content = {"weights": torch.randn(length), "step": 3, "log": [{"loss": 0.5}]}
    training_state.save_state(tmp_path, {"old": 1}, 1)
    training_state.save_state(tmp_path, content, 2, part_bytes=1000)
    parts = sorted(tmp_path.iterdir())
    assert all(path.stat().st_size <= 1000 for path in parts)
    loaded = training_state.load_state(tmp_path)
    assert torch.equal(loaded.pop("weights"), content["weights"])
    assert loaded == {"step": 3, "log": [{"loss": 0.5}]}
    parts[0].unlink()
    with pytest.raises(ValueError, match=rf"missing \[0\] of {len(parts)} parts"):
        training_state.load_state(tmp_path)
    # An older set that is whole is better than a newer one that is not.
    state_folder = tmp_path / "two"
    training_state.save_state(state_folder, content, 2)
    (state_folder / "state-4-1-of-2.part").write_bytes(b"cut off")
    assert torch.equal(training_state.load_state(state_folder)["weights"], content["weights"])
    assert training_state.load_state(tmp_path / "nothing") is None


def test_a_resumed_optimiser_does_what_one_that_goes_on_does(tmp_path: Path) -> None:
    """To the bit: the optimiser that goes on has the rounded moments, too, and the file has half of their bytes."""

    def step(weight: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        (weight.sin() ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def make(values: torch.Tensor) -> tuple[torch.Tensor, torch.optim.Optimizer]:
        weight = values.clone().requires_grad_(True)
        return weight, torch.optim.AdamW([weight], lr=0.1)

    weight, optimizer = make(torch.linspace(-1, 1, 101))
    exact = weight
    for _ in range(3):
        step(weight, optimizer)
    moments = {name: optimizer.state[exact][name].clone() for name in ("exp_avg", "exp_avg_sq")}
    training_state.save_state(
        tmp_path, {"weight": weight.detach(), "optimizer": training_state.optimizer_state(optimizer)}, 3
    )
    left = training_state.load_state(tmp_path)
    assert left is not None
    for name, before in moments.items():
        assert left["optimizer"]["state"][0][name].dtype == torch.bfloat16
        assert not torch.equal(optimizer.state[exact][name], before)  # it was rounded, so the test below says something
        torch.testing.assert_close(optimizer.state[exact][name], before, rtol=2**-8, atol=0)
    resumed, other = make(left["weight"])
    other.load_state_dict(left["optimizer"])
    for _ in range(2):
        step(weight, optimizer)
        step(resumed, other)
    assert torch.equal(weight, resumed)
