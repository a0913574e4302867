"""The diffusion model of a run: which one a resumed run takes; out of memory, and Ctrl-C, while it is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import small_config
from noisy import NoisyGuidance

from dreamfusion_fast import Generator
from dreamfusion_fast.errors import DoesNotFitError, UserError
from dreamfusion_fast.guidance import GuidanceConfig
from dreamfusion_fast.guidance.memory import GuidanceMemory
from dreamfusion_fast.training import generator as module
from dreamfusion_fast.training.trainer import Trainer

ERROR = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8.00 GiB of which ..."


class HeavyGuidance(NoisyGuidance):
    """Its weights fit once so many of them are in main memory."""

    def __init__(self, offloadable: int = 900, error: BaseException | None = None) -> None:
        super().__init__()
        self.offloaded, self.loads, self.offloadable = False, 0, offloadable
        self.error = error or torch.OutOfMemoryError(ERROR)

    def memory_needs(self, batch: int, render_size: int) -> GuidanceMemory:
        return GuidanceMemory(1000, encode=10, encode_recomputed=5, unet=10, offloadable=self.offloadable)

    def set_offload(self, on: bool) -> None:
        self.offloaded = on

    def load(self) -> None:
        self.loads += 1
        if not self.offloaded:
            raise self.error


def trainer_of(guidance: NoisyGuidance) -> Trainer:
    return Trainer(small_config(steps=3, batch=2), torch.device("cpu"), guidance)


def test_straight_to_the_rung_with_fewer_weights(said: Callable[[], list[str]]) -> None:
    guidance = HeavyGuidance()
    trainer = trainer_of(guidance)
    before = trainer.generator.get_state()
    trainer.load_guidance()
    assert (guidance.loads, trainer.plan) == (2, trainer.planner.ladder[-1])
    assert guidance.offloaded
    (line,) = said()
    assert line.startswith(f"out of memory while the weights of guidance {guidance.name!r} were loaded (Tried to")
    assert line.endswith("the guidance's weights brought from main memory in each step")
    assert torch.equal(trainer.generator.get_state(), before)
    trainer.step()


def test_where_nothing_makes_them_fewer() -> None:
    trainer = trainer_of(HeavyGuidance(offloadable=0))
    plan = trainer.plan
    with pytest.raises(DoesNotFitError, match=r"were loaded .* nothing is left to save"):
        trainer.load_guidance()
    assert trainer.plan == plan


def test_another_error_is_left_alone() -> None:
    guidance = HeavyGuidance(error=RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        trainer_of(guidance).load_guidance()
    assert guidance.loads == 1


def generator_of(folder: Path, guidance: NoisyGuidance) -> Generator:
    config = small_config(steps=3, out=str(folder), guidance=GuidanceConfig(name="elsewhere/heavy"))
    return Generator(config, guidance=guidance)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (torch.OutOfMemoryError(ERROR), UserError, "nothing is left to save"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_the_run_can_be_continued(
    tmp_path: Path, said: Callable[[], list[str]], error: BaseException, raised: Any, message: str | None
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(raised, match=message) as caught:
        generator_of(folder, HeavyGuidance(offloadable=0, error=error)).run()
    printed = "\n".join(said())
    assert "loading ball" in printed
    assert f"continue: dreamfusion-fast generate --resume {folder}" in printed + str(caught.value)
    assert Generator.resume(folder, guidance=NoisyGuidance()).run().steps == 3


class Branch:
    """A repository on the hub whose branch moves."""

    def __init__(self) -> None:
        self.head, self.asked = "first", list[str | None]()

    def create_guidance(self, config: GuidanceConfig, device: torch.device) -> NoisyGuidance:
        self.asked.append(config.revision)
        guidance = NoisyGuidance()
        guidance.revision = self.head if config.revision in (None, "main") else config.revision
        return guidance


@pytest.fixture
def branch(monkeypatch: pytest.MonkeyPatch) -> Branch:
    branch = Branch()
    monkeypatch.setattr(module, "create_guidance", branch.create_guidance)
    monkeypatch.setattr("dreamfusion_fast.training.trainer.create_guidance", branch.create_guidance)
    return branch


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "main"])
def test_a_resumed_run_goes_on_with_the_weights_it_began_with(tmp_path: Path, branch: Branch, name: str | None) -> None:
    folder = tmp_path / "run"
    config = small_config(steps=3, out=str(folder), guidance=GuidanceConfig(name="owner/name", revision=name))
    Generator(config).run()
    branch.head = "second"
    for steps in (4, 5):
        resumed = Generator.resume(folder, dataclasses.replace(config, steps=steps))
        resumed.run()
        assert resumed.config.guidance.revision == name, "another model could not be had at that commit"
    given = dataclasses.replace(config, steps=6, guidance=GuidanceConfig(name="owner/name", revision="third"))
    Generator.resume(folder, given).run()
    assert branch.asked == [name, "first", "first", "third"]


def test_another_model_is_said(tmp_path: Path, branch: Branch, said: Callable[[], list[str]]) -> None:
    folder = tmp_path / "run"
    config = small_config(steps=3, out=str(folder), guidance=GuidanceConfig(name="owner/name"))
    Generator(config).run()
    assert not any("goes on with" in line for line in said())
    other = dataclasses.replace(config, steps=4, guidance=GuidanceConfig(name="owner/other"))
    Generator.resume(folder, other).run()
    assert "this run was guided by owner/name, and goes on with owner/other" in said()
    assert branch.asked == [None, None]
