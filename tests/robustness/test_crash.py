"""A run that is killed at any moment goes on, and ends as one that was not: the same bits, and no other files.

The long form (`forms`) has 200 kills: one before every change of a file, the rest at random moments.
"""

from __future__ import annotations

import os
import random
import time

import pytest
import torch
from forms import LONG
from robustness.conftest import EVERY

from dreamfusion_fast.training.checkpoint import load_checkpoint

KILLS = 200  # of the long form
FILES = ["checkpoint.safetensors", "config.yaml", "mesh.glb", "preview.png", "turntable.mp4"]


@pytest.fixture(scope="module")
def whole(server, config_file, tmp_path_factory):
    """The folder of a run that nothing happened to, the arguments of such a run, its operations and its seconds."""
    cwd = tmp_path_factory.mktemp("whole")
    arguments = ("generate", "a cup", "--config", str(config_file), "--out", "run")
    began = time.monotonic()
    assert server.run(cwd, *arguments) == 0, (cwd / "log").read_text()
    return cwd, arguments, int((cwd / "operations").read_text()), time.monotonic() - began


def killed_then_resumed(server, whole, cwd, **when):
    """Kill a run, go on with it by the command that its folder asks for, and compare."""
    expected, arguments, _, _ = whole
    cwd.mkdir()
    code = server.run(cwd, *arguments, **when)
    assert code in (-9, 0), (cwd / "log").read_text()
    done = len((cwd / "steps").read_text()) if (cwd / "steps").exists() else 0
    checkpoint = cwd / "run" / "checkpoint.safetensors"
    if checkpoint.exists():
        assert done - load_checkpoint(checkpoint).step <= EVERY
        assert server.run(cwd, *arguments) == 2
        assert "continue it with --resume run" in (cwd / "log").read_text()
        arguments = ("generate", "--resume", "run")
    else:
        assert done == 0
        assert server.run(cwd, "generate", "--resume", "run") == 2
    assert server.run(cwd, *arguments) == 0, (cwd / "log").read_text()
    assert "Traceback" not in (cwd / "log").read_text()
    assert sorted(os.listdir(cwd / "run")) == FILES
    for name in FILES[1:]:
        assert (cwd / "run" / name).read_bytes() == (expected / "run" / name).read_bytes(), name
    mine, theirs = load_checkpoint(checkpoint), load_checkpoint(expected / "run" / checkpoint.name)
    assert (mine.config, mine.step, mine.meta) == (theirs.config, theirs.step, theirs.meta)
    assert mine.tensors.keys() == theirs.tensors.keys()
    for name, value in mine.tensors.items():
        assert torch.equal(value, theirs.tensors[name]), name


@pytest.mark.slow
def test_a_run_that_nothing_happens_to(whole):
    cwd, _, operations, _ = whole
    assert sorted(os.listdir(cwd / "run")) == FILES
    assert operations > 20
    assert len((cwd / "steps").read_text()) == 5


@pytest.mark.slow
def test_killed_before_a_change_of_a_file(server, whole, tmp_path):
    operations = whole[2]
    moments = range(1, operations + 1) if LONG else [3, 10, operations // 2, operations - 3]
    for moment in moments:
        killed_then_resumed(server, whole, tmp_path / str(moment), kill_at=moment)


@pytest.mark.slow
def test_killed_at_random(server, whole, tmp_path):
    seed = random.randrange(1 << 32)
    print("seed", seed)  # shown where the test fails
    moments = random.Random(seed)
    for number in range(KILLS - whole[2] if LONG else 1):
        killed_then_resumed(server, whole, tmp_path / str(number), seconds=moments.uniform(0, whole[3]))
