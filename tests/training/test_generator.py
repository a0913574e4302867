"""From a prompt to a folder: what is written, refused, continued, interrupted."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading

import pytest
import torch
import trimesh
from fakes import BallGuidance, small_config

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.fields import TriplaneFieldConfig
from dreamfusion_fast.guidance.config import GuidanceConfig
from dreamfusion_fast.training.callbacks import Callback
from dreamfusion_fast.training.checkpoint import load_checkpoint
from dreamfusion_fast.training.config import Config, HashGridFieldConfig
from dreamfusion_fast.training.generator import Generator
from dreamfusion_fast.training.sections import ExportConfig, LogConfig


def generator_of(folder, guidance=None, callbacks=(), **settings):
    return Generator(small_config(out=str(folder), **settings), callbacks, guidance or BallGuidance())


def tensors_of(folder):
    return load_checkpoint(folder / "checkpoint.safetensors").tensors


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


class Record(Callback):
    """Notes what it is told, and does something after a step."""

    def __init__(self, at=None, action=None):
        self.told, self.at, self.action = [], at, action

    def on_start(self, trainer):
        self.told.append(("start", trainer.steps_done))

    def on_step(self, trainer, result):
        self.told.append(("step", result.step))
        if result.step == self.at:
            self.action()

    def on_end(self, trainer):
        self.told.append(("end", trainer.steps_done))


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def fail():
    raise RuntimeError("a bug in a callback")


def test_everything_is_written(tmp_path):
    log = LogConfig(preview_every=3, checkpoint_every=2, tensorboard=True, log_every=1, progress_bar=False)
    result = generator_of(tmp_path / "run", steps=4, log=log).run()
    assert result.folder == tmp_path / "run"
    assert result.steps == 4
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "checkpoint.safetensors",
        "config.yaml",
        "mesh.glb",
        "preview.png",
        "tensorboard",
        "turntable.mp4",
    ]
    mesh = trimesh.load(result.folder / "mesh.glb", force="mesh")
    assert len(mesh.faces) == result.mesh.faces > 50
    assert Config.load(result.folder / "config.yaml").steps == 4
    assert load_checkpoint(result.folder / "checkpoint.safetensors").step == 4


@pytest.mark.slow
def test_same_seed_same_files(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generator_of(tmp_path / name, steps=3, seed=seed).run()
    first, second, third = ((tmp_path / name / "mesh.glb").read_bytes() for name in "abc")
    assert first == second
    assert first != third
    assert_same_tensors(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"))


def test_callbacks_are_told_in_order(tmp_path):
    record = Record()
    generator_of(tmp_path / "run", callbacks=[record], steps=3).run()
    assert record.told == [("start", 0), ("step", 1), ("step", 2), ("step", 3), ("end", 3)]


def test_prompt_and_settings(tmp_path):
    generator = Generator("a chair", steps=5, out=str(tmp_path), guidance=GuidanceConfig(guidance_scale=7.0))
    assert (generator.config.prompt, generator.config.steps, generator.config.guidance.guidance_scale) == (
        "a chair",
        5,
        7,
    )
    with pytest.raises(TypeError, match="stepz"):
        Generator("a chair", stepz=5)
    with pytest.raises(UserError, match="prompt is empty"):
        Generator(" ")
    with pytest.raises(UserError, match="unknown device"):
        Generator("a chair", device="tpu")


def test_views_per_step_are_those_of_the_device_and_are_kept(tmp_path):
    generator_of(tmp_path / "run", steps=1, batch=None).run()
    assert Config.load(tmp_path / "run" / "config.yaml").batch == 2
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors").config.batch == 2
    assert Generator("a chair", batch=5).config.batch == 5


@pytest.mark.slow
def test_default_folder_is_named_after_the_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert generator_of("", steps=1).run().folder.as_posix() == "out/a-red-ball"
    assert generator_of("", steps=1).run().folder.as_posix() == "out/a-red-ball-2"


def test_used_folder_is_refused_untouched(tmp_path):
    generator_of(tmp_path / "run", steps=1).run()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="already holds a run"):
        generator_of(tmp_path / "run", steps=1).run()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def test_no_folder_is_left_where_the_guidance_cannot_be_had(tmp_path):
    config = small_config(out=str(tmp_path / "run"), guidance=GuidanceConfig(name="nonsense"))
    with pytest.raises(UserError, match="nonsense"):
        Generator(config).run()
    assert not (tmp_path / "run").exists()


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_continue(tmp_path, said):
    handler, record = signal.getsignal(signal.SIGINT), Record(3, interrupt)
    folder = tmp_path / "a run"
    with pytest.raises(KeyboardInterrupt):
        generator_of(folder, callbacks=[record]).run()
    assert signal.getsignal(signal.SIGINT) is handler
    assert record.told[-2:] == [("step", 3), ("end", 3)]  # the step in progress ends whole
    line = f"stopped after step 3 of 12; continue: dreamfusion-fast generate --resume '{folder}'"
    assert said()[-1] == line
    assert load_checkpoint(folder / "checkpoint.safetensors").step == 3
    assert not (folder / "mesh.glb").exists()

    # Interrupted and resumed is the same as never interrupted, to the bit.
    result = Generator.resume(folder, guidance=BallGuidance()).run()
    assert result.steps == 12
    generator_of(tmp_path / "whole").run()
    assert_same_tensors(tensors_of(folder), tensors_of(tmp_path / "whole"))
    assert (folder / "mesh.glb").read_bytes() == (tmp_path / "whole" / "mesh.glb").read_bytes()


@pytest.mark.slow
def test_a_triplane_is_trained_and_resumed_to_the_bit(tmp_path):
    field = TriplaneFieldConfig(resolution=12, features=4, hidden=16)
    with pytest.raises(KeyboardInterrupt):
        generator_of(tmp_path / "halved", callbacks=[Record(5, interrupt)], field=field).run()
    stopped = tensors_of(tmp_path / "halved")
    assert Generator.resume(tmp_path / "halved", guidance=BallGuidance()).run().steps == 12
    generator_of(tmp_path / "whole", field=field).run()
    assert_same_tensors(tensors_of(tmp_path / "halved"), tensors_of(tmp_path / "whole"))
    assert not torch.equal(stopped["field.planes"], tensors_of(tmp_path / "whole")["field.planes"])
    assert (tmp_path / "halved" / "mesh.glb").read_bytes() == (tmp_path / "whole" / "mesh.glb").read_bytes()


@pytest.mark.slow
def test_ctrl_c_before_the_last_stage_leaves_it_to_be_done(tmp_path):
    folder, record = tmp_path / "run", Record(12, interrupt)
    with pytest.raises(KeyboardInterrupt):
        generator_of(folder, callbacks=[record]).run()
    stopped = load_checkpoint(folder / "checkpoint.safetensors")
    assert (stopped.step, stopped.meta["firmed"]) == (12, False)
    Generator.resume(folder, guidance=BallGuidance()).run()
    generator_of(tmp_path / "whole").run()
    assert load_checkpoint(folder / "checkpoint.safetensors").meta["firmed"]
    assert_same_tensors(tensors_of(folder), tensors_of(tmp_path / "whole"))
    assert not torch.equal(tensors_of(folder)["field.table"], stopped.tensors["field.table"])


@pytest.mark.slow
def test_a_run_that_is_done_is_not_firmed_again(tmp_path):
    generator_of(tmp_path / "run", steps=2).run()
    before = tensors_of(tmp_path / "run")
    Generator.resume(tmp_path / "run", guidance=BallGuidance()).run()
    assert_same_tensors(before, tensors_of(tmp_path / "run"))


def test_second_ctrl_c_stops_at_once(tmp_path, said):
    def twice():
        interrupt()
        interrupt()

    record = Record(2, twice)
    with pytest.raises(KeyboardInterrupt):
        generator_of(tmp_path / "run", callbacks=[record]).run()
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors").step == 0  # the one of the start
    assert said()[-1].startswith("stopped after step 2 of 12, saved is step 0; continue: ")


def test_ctrl_c_during_the_export_says_how_to_continue(tmp_path, said, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("dreamfusion_fast.training.generator.export_field", lambda *a, **b: interrupt())
        # A shell starts what it puts into the background with SIGINT ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                generator_of(tmp_path / "run", steps=2).run()
        finally:
            signal.signal(signal.SIGINT, before)
    assert said()[-1].startswith("stopped during the export; continue: dreamfusion-fast generate --resume")
    record = Record()
    result = Generator.resume(tmp_path / "run", callbacks=[record], guidance=BallGuidance()).run()
    assert record.told == [("start", 2), ("end", 2)]
    assert (result.folder / "mesh.glb").is_file()


def test_runs_outside_the_main_thread(tmp_path):
    """Where no signal handler can be installed."""
    results = []
    thread = threading.Thread(target=lambda: results.append(generator_of(tmp_path / "run", steps=1).run()))
    thread.start()
    thread.join()
    assert results[0].steps == 1


def test_nan_keeps_the_old_checkpoint(tmp_path):
    log = LogConfig(preview_every=0, checkpoint_every=2, tensorboard=False, progress_bar=False)
    record = Record()
    with pytest.raises(UserError, match=r"became nan at step 6.*the last good checkpoint is .*checkpoint.safetensors"):
        generator_of(tmp_path / "run", BallGuidance(nan_at=5), [record], log=log).run()
    assert record.told[-1] == ("end", 5)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors").step == 4
    assert not (tmp_path / "run" / "mesh.glb").exists()
    assert Generator.resume(tmp_path / "run", guidance=BallGuidance()).run().steps == 12


@pytest.mark.slow
def test_profile_is_said_at_the_end_and_on_ctrl_c(tmp_path, said):
    result = generator_of(tmp_path / "whole", profile=True).run()
    assert said()[-1] == result.profile.table()
    assert result.profile.whole.steps == 6  # of the 6 at the first size, or of the 6 at the second
    with pytest.raises(KeyboardInterrupt):
        generator_of(tmp_path / "part", callbacks=[Record(3, interrupt)], profile=True).run()
    assert "profile: medians of 3 steps, the first ones included, 12x12, 2 views, CPU" in said()[-1]
    assert generator_of(tmp_path / "plain", steps=1).run().profile is None
    assert not any("profile" in line for line in said())


@pytest.mark.slow
def test_profile_does_not_change_a_run(tmp_path):
    generator_of(tmp_path / "a", profile=True).run()
    generator_of(tmp_path / "b").run()
    assert_same_tensors(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"))


def test_the_memory_plan_is_said(tmp_path, said):
    generator_of(tmp_path / "run", steps=1, memory="2GB").run()
    first, second = said()
    assert first.startswith("memory: 2.0 GB (--memory 2GB); the run is expected to take ")
    assert second == "memory plan: it fits, nothing has to be saved"
    for memory in ("2 apples", 0, -2_000_000_000, True):
        with pytest.raises(UserError, match=f"memory(: got {memory!r}| has to be a size .*, not {memory!r})"):
            generator_of(tmp_path / "other", memory=memory)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_memory_as_a_number_of_bytes(tmp_path, said):
    assert Generator("a chair", memory=16_000_000_000).config.memory == 16_000_000_000
    generator_of(tmp_path / "run", steps=1, memory=2_000_000_000).run()
    assert said()[0].startswith("memory: 2.0 GB (--memory 2000000000); the run is expected to take ")
    assert Config.load(tmp_path / "run" / "config.yaml").memory == 2_000_000_000
    assert Generator.resume(tmp_path / "run", guidance=BallGuidance()).run().steps == 1


@pytest.mark.slow
def test_out_of_memory_for_good_leaves_the_last_whole_step(tmp_path):
    class Starved(BallGuidance):
        def gradient(self, request):
            if len(self.calls) == 3:
                raise torch.OutOfMemoryError("Tried to allocate 1.00 GiB")
            return super().gradient(request)

    with pytest.raises(UserError, match=r"out of memory in step 4 .*continue: dreamfusion-fast generate --resume"):
        generator_of(tmp_path / "run", Starved()).run()
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors").step == 3
    Generator.resume(tmp_path / "run", guidance=BallGuidance()).run()
    generator_of(tmp_path / "whole").run()
    assert_same_tensors(tensors_of(tmp_path / "run"), tensors_of(tmp_path / "whole"))


def test_a_failing_callback_ends_the_others(tmp_path):
    record = Record()
    with pytest.raises(RuntimeError, match="a bug in a callback"):
        generator_of(tmp_path / "run", callbacks=[record, Record(2, fail)]).run()
    assert record.told[-1] == ("end", 2)


@pytest.mark.slow
def test_resume_checks_the_architecture(tmp_path):
    generator_of(tmp_path / "run", steps=2).run()
    longer = small_config(out=str(tmp_path / "run"), steps=4)
    assert Generator.resume(tmp_path / "run", longer, guidance=BallGuidance()).run().steps == 4
    other = dataclasses.replace(longer, field=HashGridFieldConfig(levels=3))
    with pytest.raises(UserError, match=r"of another config .*field\.levels: 4, here 3"):
        Generator.resume(tmp_path / "run", other)
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="is corrupt"):
        Generator.resume(tmp_path / "run")
    with pytest.raises(UserError, match="is no folder"):
        Generator.resume(tmp_path / "nothing")


@pytest.mark.slow
def test_export_again_with_other_settings(tmp_path):
    """Without loading a diffusion model: the config names one that is not there."""
    absent = small_config(out=str(tmp_path / "run"), steps=2, guidance=GuidanceConfig(name="absent-model"))
    Generator(absent, guidance=BallGuidance()).run()
    with pytest.raises(UserError, match="absent-model"):
        Generator.resume(tmp_path / "run").run()
    before = (tmp_path / "run" / "mesh.glb").read_bytes()
    config = Config.load(tmp_path / "run" / "config.yaml")
    coarse = dataclasses.replace(
        config, export=ExportConfig(16, texture_size=32, turntable_frames=0, turntable_size=16)
    )
    summary = Generator.resume(tmp_path / "run", coarse).export(tmp_path / "other")
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["mesh.glb", "preview.png"]
    assert len(trimesh.load(tmp_path / "other" / "mesh.glb", force="mesh").faces) == summary.faces
    assert (tmp_path / "run" / "mesh.glb").read_bytes() == before
    Generator.resume(tmp_path / "run", config).export()
    assert (tmp_path / "run" / "mesh.glb").read_bytes() == before  # the same field, the same file
    with pytest.raises(UserError, match="nothing to export yet"):
        Generator(config).export()


@pytest.mark.slow
def test_export_after_a_run_is_of_what_was_made(tmp_path):
    """And not of a field that was never optimised."""
    generator = generator_of(tmp_path / "run", steps=4)
    generator.run()
    generator.export(tmp_path / "other")
    assert (tmp_path / "other" / "mesh.glb").read_bytes() == (tmp_path / "run" / "mesh.glb").read_bytes()
    resumed = Generator.resume(tmp_path / "run").scene()
    for name, value in generator.scene().state().items():
        assert torch.equal(value, resumed.state()[name]), name


def test_nothing_to_see_is_one_clear_error(tmp_path):
    field = dataclasses.replace(small_config().field, blob_scale=0.0)
    export = dataclasses.replace(small_config().export, threshold=1e6)
    with pytest.raises(UserError, match="surface"):
        generator_of(tmp_path / "run", steps=1, field=field, export=export).run()
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors").step == 1
