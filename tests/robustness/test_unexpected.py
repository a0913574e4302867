"""Errors that nobody foresaw: what is finite is saved first, it is said how to continue, and the error is raised."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys

import pytest
import torch
from fakes import BallGuidance, small_config

from dreamfusion_fast import cli
from dreamfusion_fast.errors import Interrupted, UserError
from dreamfusion_fast.streams import unfailing_output
from dreamfusion_fast.training.callbacks import Callback
from dreamfusion_fast.training.checkpoint import load_checkpoint
from dreamfusion_fast.training.generator import Generator
from dreamfusion_fast.training.sections import LogConfig

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Bits are compared."""


EXPORT = Generator._export


@pytest.fixture(scope="module", autouse=True)
def _no_export():
    """A mesh takes longer than the run, and most tests here are of what is before it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "_export", lambda self, scene, folder: folder.mesh.touch())
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, _no_export):
    """The state after a run that nothing disturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole") / "run"
    generator_of(folder).run()
    torch.set_num_threads(threads)
    return tensors_of(folder)


def generator_of(folder, guidance=None, callbacks=(), **settings):
    return Generator(small_config(out=str(folder), **settings), callbacks, guidance or BallGuidance())


def tensors_of(folder):
    return load_checkpoint(folder / "checkpoint.safetensors").tensors


def step_of(folder):
    return load_checkpoint(folder / "checkpoint.safetensors").step


def assert_resumed_equals(folder, whole):
    Generator.resume(folder, guidance=BallGuidance()).run()
    resumed = tensors_of(folder)
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def raising(error):
    def raise_it(*arguments, **options):
        raise error

    return raise_it


def guidance_that_does(action, at):
    class Acting(BallGuidance):
        def gradient(self, request):
            if len(self.calls) == at:
                action()
            return super().gradient(request)

    return Acting()


class At(Callback):
    """Does something in one of its methods, after some step."""

    def __init__(self, method, action, step=5):
        def called(trainer, result=None):
            if result is None or result.step == step:
                action()

        setattr(self, method, called)


# The grid is updated in the steps 1, 5 and 9; that step is undone as a whole.
@pytest.mark.quick(2)
@pytest.mark.parametrize("at", [4, 6])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("a bug"), FULL, SystemExit(3), torch.OutOfMemoryError("CUDA out of memory"), MemoryError()],
    ids=lambda error: type(error).__name__,
)
def test_a_step_that_raises_costs_no_step_before_it(tmp_path, undisturbed, said, error, at):
    folder = tmp_path / "run"
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    with pytest.raises(UserError if memory else type(error)) as raised:
        generator_of(folder, guidance_that_does(raising(error), at)).run()
    assert memory or raised.value is error
    line = str(raised.value) if memory else said()[-1]
    assert f"continue: dreamfusion-fast generate --resume {folder}" in line
    assert memory or f"stopped after step {at} of 12; " in line
    assert step_of(folder) == at
    assert_resumed_equals(folder, undisturbed)


@pytest.mark.parametrize(("method", "step"), [("on_start", 0), ("on_step", 5), ("on_end", 12)])
def test_a_callback_s_error_is_raised_as_it_is_after_all_was_saved(tmp_path, undisturbed, said, method, step):
    folder, error = tmp_path / "run", KeyError("a bug in a callback")
    with pytest.raises(KeyError) as raised:
        generator_of(folder, callbacks=[At(method, raising(error))]).run()
    assert raised.value is error
    assert said()[-1].startswith(f"stopped after step {step} of 12; continue: dreamfusion-fast generate --resume")
    assert step_of(folder) == step
    assert_resumed_equals(folder, undisturbed)


def test_where_not_even_that_can_be_saved_it_says_which_step_is(tmp_path, said, monkeypatch):
    def fail():
        monkeypatch.setattr("dreamfusion_fast.training.callbacks.save_checkpoint", raising(FULL))
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        generator_of(tmp_path / "run", callbacks=[At("on_step", fail)]).run()
    assert "stopped after step 5 of 12, saved is step 0; continue: " in said()[-1]
    assert step_of(tmp_path / "run") == 0


def test_a_nan_is_not_saved_whatever_ends_the_run(tmp_path):
    class Spoil(Callback):
        def on_step(self, trainer, result):
            if result.step == 5:
                with torch.no_grad():
                    trainer.scene.field.table[0, 0] = float("nan")
                raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        generator_of(tmp_path / "run", callbacks=[Spoil()]).run()
    assert step_of(tmp_path / "run") == 0


def test_showing_progress_and_pictures_ends_no_run(tmp_path, undisturbed, said, monkeypatch):
    monkeypatch.setattr(Generator, "_export", EXPORT)
    for name in ("callbacks.save_png", "generator.render_preview", "generator.render_turntable"):
        monkeypatch.setattr(f"dreamfusion_fast.training.{name}", raising(FULL))
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", raising(FULL))
    monkeypatch.setattr("rich.progress.Progress.update", raising(ValueError("no such task")))
    log = LogConfig(preview_every=2, checkpoint_every=0, tensorboard=True, log_every=1, progress_bar=True)
    folder = tmp_path / "run"
    generator_of(folder, log=log).run()
    full = "(OSError: [Errno 28] No space left on device)"
    assert said() == [
        "progress bar: switched off, the run goes on (ValueError: no such task)",
        f"curves: switched off, the run goes on {full}",
        f"preview.png: switched off, the run goes on {full}",
        f"no preview.png {full}; the mesh is there, and dreamfusion-fast export makes it again",
        f"no turntable.mp4 {full}; the mesh is there, and dreamfusion-fast export makes it again",
    ]
    assert (folder / "mesh.glb").stat().st_size > 1000
    state = tensors_of(folder)
    for name, value in undisturbed.items():
        assert torch.equal(state[name], value), name


def test_checkpoints_that_cannot_be_written_do_not_cost_the_mesh(tmp_path, said, monkeypatch):
    def fill_the_disk():
        monkeypatch.setattr("dreamfusion_fast.training.callbacks.save_checkpoint", raising(FULL))

    generator_of(tmp_path / "run", callbacks=[At("on_step", fill_the_disk)]).run()
    assert "no checkpoint of step 12, that of step 0 is kept" in said()[-1]
    assert (tmp_path / "run" / "mesh.glb").is_file()


def test_memory_that_runs_out_in_the_last_stage_is_saved_there_too(tmp_path, undisturbed, said, monkeypatch):
    from dreamfusion_fast.training import trainer

    calls, firm_field = [], trainer.firm_field

    def starved(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes")
        return firm_field(*arguments)

    monkeypatch.setattr(trainer, "firm_field", starved)
    generator_of(tmp_path / "run").run()
    assert said()[0].startswith("out of memory in the last stage (DefaultCPUAllocator: can't allocate memory")
    state = tensors_of(tmp_path / "run")
    for name, value in undisturbed.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_export_ends_it_at_once(tmp_path, said, monkeypatch, number):
    before = signal.getsignal(number)
    if before == signal.SIG_IGN:
        pytest.skip("this signal is ignored, as by what nohup starts")
    monkeypatch.setattr(Generator, "_export", lambda *arguments: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted) as stopped:
        generator_of(tmp_path / "run", steps=1).run()
    assert stopped.value.number == number
    assert said()[-1].startswith("stopped during the export; continue: ")
    assert signal.getsignal(number) == before


class FullStream(io.StringIO):
    def write(self, text):
        raise FULL

    def flush(self):
        raise FULL


def test_output_of_the_command_line_never_raises(monkeypatch, capsys):
    for out, err in ((FullStream(), FullStream()), (None, None)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            assert cli.main(["--version"]) == 0
            assert cli.main(["nonsense"]) == 2
            assert (sys.stdout, sys.stderr) == (out, err)
    assert capsys.readouterr() == ("", "")


def test_letters_that_an_encoding_lacks_are_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with unfailing_output():
        print("ein Stühlchen \udcff")
    assert written.getvalue() == b"ein St\\xfchlchen \\udcff\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory (DefaultCPUAllocator"),
        (RuntimeError("std::bad_alloc"), "out of memory (std::bad_alloc)"),
        (MemoryError("Unable to allocate 1.0 GiB"), "out of memory (Unable to allocate 1.0 GiB)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory ([Errno 12] Cannot allocate memory)"),
        (OSError(errno.ENOSPC, "No space left on device", "out/a"), "No space left on device: out/a"),
    ],
)
def test_what_the_surroundings_lack_is_one_line(monkeypatch, capsys, error, message):
    monkeypatch.setitem(cli.COMMANDS, "doctor", raising(error))
    assert cli.main(["doctor"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {message}")
    assert line.count("\n") == 1
