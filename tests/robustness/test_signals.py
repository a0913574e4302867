"""Signals and broken output streams of a real process: a run ends as it should, or goes on as if nothing were."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import small_config

from dreamfusion_fast import signals
from dreamfusion_fast.errors import Interrupted
from dreamfusion_fast.training.checkpoint import load_checkpoint

ROOT = Path(signals.__file__).parents[1]
# A run of the command line with the guidance of tests, without a diffusion model to import.
RUN = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parents[1])!r}]
import torch
from fakes import BallGuidance
from types import SimpleNamespace
from dreamfusion_fast.cli import main
from dreamfusion_fast.export import Agreement
from dreamfusion_fast.training import generator, trainer
torch.set_num_threads(1)
trainer.create_guidance = lambda *arguments: BallGuidance()

def export(self, scene, folder):  # takes longer than the run, and has a process of its own for the video alone
    folder.mesh.touch()
    return SimpleNamespace(agreement=Agreement(iou=1.0, covered=1.0, color=0.0))

generator.Generator._export = export
"""
MAIN = "sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "small.yaml"
    small_config(prompt="a cup", steps=3).save(file)
    return file


def start(code, *arguments, environment=None, **options):
    command = [sys.executable, "-c", RUN + code, "generate", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"} | options
    return subprocess.Popen(command, env=os.environ | (environment or {}), **options)


def finished(process):
    """Exit code, stdout and stderr of a process that ends by itself."""
    try:
        out, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, errors


def wait_for_step(process, checkpoint, step):
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if checkpoint.exists() and load_checkpoint(checkpoint).step >= step:
            return
        time.sleep(0.05)
    pytest.fail(f"the run did not get to step {step}: {process.communicate()}")


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_and_says_how_to_continue(tmp_path, config_file):
    out = tmp_path / "a run"
    process = start(
        MAIN, "--config", config_file, "--out", out, "--steps", 10**6, "--log.checkpoint-every", 1, "--log.progress-bar"
    )
    try:
        wait_for_step(process, out / "checkpoint.safetensors", 2)
        process.send_signal(signal.SIGTERM)
    except BaseException:
        process.kill()
        raise
    code, _, errors = finished(process)
    assert code == 128 + signal.SIGTERM, errors
    done = load_checkpoint(out / "checkpoint.safetensors").step
    assert f"stopped after step {done} of 1000000; continue: dreamfusion-fast generate --resume '{out}'" in errors
    assert "Traceback" not in errors
    assert {path.name for path in out.iterdir()} == {"config.yaml", "checkpoint.safetensors"}


@pytest.mark.slow
def test_a_terminal_that_was_closed_costs_nothing(tmp_path, config_file):
    """After its SIGHUP, nothing can be written to it any more."""
    out = tmp_path / "run"
    master, slave = os.openpty()
    process = start(
        MAIN,
        *("--config", config_file, "--out", out, "--steps", 10**6, "--log.checkpoint-every", 4, "--log.progress-bar"),
        **{name: slave for name in ("stdin", "stdout", "stderr")},
    )
    os.close(slave)
    try:
        wait_for_step(process, out / "checkpoint.safetensors", 4)
        os.close(master)
        process.send_signal(signal.SIGHUP)
    except BaseException:
        process.kill()
        raise
    assert finished(process)[0] == 128 + signal.SIGHUP
    assert load_checkpoint(out / "checkpoint.safetensors").step >= 4
    assert {path.name for path in out.iterdir()} == {"config.yaml", "checkpoint.safetensors"}


@pytest.mark.slow
def test_full_streams_and_a_closed_pipe_end_no_run(tmp_path, config_file):
    with open("/dev/full", "w") as full:
        process = start(
            MAIN, "--config", config_file, "--out", tmp_path / "full", "--log.progress-bar", stdout=full, stderr=full
        )
    reading, writing = os.pipe()
    os.close(reading)
    other = start(MAIN, "--config", config_file, "--out", tmp_path / "closed", "--log.progress-bar", stdout=writing)
    os.close(writing)
    assert finished(process)[0] == 0
    code, _, errors = finished(other)
    assert code == 0
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    for name in ("full", "closed"):
        assert (tmp_path / name / "mesh.glb").is_file()


@pytest.mark.slow
def test_letters_that_a_terminal_lacks_end_no_run(tmp_path, config_file):
    out = tmp_path / "Stühlchen"
    arguments = ("ein Stühlchen", "--config", config_file, "--out", out, "--log.progress-bar")
    code, printed, errors = finished(start(MAIN, *arguments, environment={"PYTHONIOENCODING": "ascii"}))
    assert code == 0, errors
    assert r"ein St\xfchlchen" in printed
    assert printed.endswith(f"done: {tmp_path}/St\\xfchlchen\n")


@pytest.mark.slow
def test_out_of_memory_on_a_cpu_is_one_line(tmp_path, config_file):
    """Of a real allocator, at the start and in a step; the limit keeps a machine that promises too much from paying."""
    options = ("--config", config_file, "--out", tmp_path / "large", "--field.log2-rows", 28)
    large = start(MAIN, *options, "--field.levels", 32, "--field.finest-resolution", 4096, preexec_fn=limit_memory)
    starved = start(STARVED + MAIN, "--config", config_file, "--out", tmp_path / "run")
    code, _, errors = finished(large)
    assert code == 2, errors
    assert "error: out of memory (" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "large").exists()
    code, _, errors = finished(starved)
    assert code == 2, errors
    assert "out of memory in step 3 (" in errors
    assert "; from here on a render workspace of 17 MB" in errors
    assert f"continue: dreamfusion-fast generate --resume {tmp_path / 'run'}" in errors
    assert "Traceback" not in errors
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors").step == 2


def limit_memory():
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))


# From the third step on, the guidance asks for more memory than a process can have.
STARVED = """
class Starved(BallGuidance):
    def gradient(self, request):
        if len(self.calls) == 2:
            torch.empty(1 << 60, dtype=torch.uint8)
        return super().gradient(request)

trainer.create_guidance = lambda *arguments: Starved()
"""


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    others = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with signals.stop_signals(deferred=True) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.made()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.number == signal.SIGTERM
            with pytest.raises(Interrupted) as second:
                os.kill(os.getpid(), signal.SIGINT)
            assert second.value.number == signal.SIGINT
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == others
    finally:
        signal.signal(signal.SIGHUP, before)
