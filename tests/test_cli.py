"""The command line: what it hands on, and one line with exit code 2 for every mistake."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import write_amortised
from PIL import Image
from safetensors.torch import save_file

from dreamfusion_fast import cli
from dreamfusion_fast.errors import UserError
from dreamfusion_fast.export import Agreement
from dreamfusion_fast.io import RunFolder
from dreamfusion_fast.training.checkpoint import save_checkpoint
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.sections import ExportConfig


class FakeGenerator:
    """Stands in for the trainer; keeps what it was told."""

    told: list = []  # noqa: RUF012
    error: BaseException | None = None
    agreement = Agreement(iou=0.981, covered=0.992, color=0.03)

    def __init__(self, config, folder=None, ranks=None):
        self.config, self.folder = config, Path(folder or config.out)

    @classmethod
    def resume(cls, folder, config, ranks=None):
        return cls(config, folder)

    def run(self):
        if FakeGenerator.error is not None:
            raise FakeGenerator.error
        FakeGenerator.told.append(("run", self.config, self.folder))
        return types.SimpleNamespace(folder=self.folder, mesh=types.SimpleNamespace(agreement=self.agreement))

    def export(self, out):
        FakeGenerator.told.append(("export", self.config, Path(out)))
        return types.SimpleNamespace(agreement=self.agreement)


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    FakeGenerator.told, FakeGenerator.error = [], None
    module = types.SimpleNamespace(Generator=FakeGenerator)
    monkeypatch.setitem(sys.modules, "dreamfusion_fast.training.generator", module)
    monkeypatch.delenv("DREAMFUSION_FAST_DEBUG", raising=False)
    return FakeGenerator


@pytest.fixture
def run_folder(tmp_path):
    """A finished run."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    config = Config(prompt="a chair", steps=77, out=str(folder.path), export=ExportConfig(resolution=99))
    config.save(folder.config)
    save_checkpoint(folder.checkpoint, tensors={"a": torch.zeros(3)}, config=config, step=5)
    return folder


def fails(capsys, *arguments):
    """Run, expect exit code 2 and one line; return it."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err.strip()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(capsys, arguments):
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"dreamfusion-fast {command}" in printed


def test_help_does_not_import_torch():
    code = (
        "import sys; from dreamfusion_fast.cli import main; main(['--help']); main(['doctor', '--help']);"
        "sys.exit(3 if {'torch', 'tyro', 'diffusers'} & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("command", ["generate", "export", "sample", "doctor"])
def test_every_command_has_help(capsys, command):
    assert cli.main([command, "--help"]) == 0
    assert "usage: dreamfusion-fast " + command in capsys.readouterr().out


def test_generate_help_names_every_field(capsys):
    cli.main(["generate", "--help"])
    printed = capsys.readouterr().out

    def names(config, prefix):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                yield from names(value, f"{prefix}{field.name.replace('_', '-')}.")
            elif field.name != "prompt":
                yield f"--{prefix}{field.name.replace('_', '-')}"

    for name in (*names(Config(), ""), "--config", "--resume"):
        assert name in printed


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dreamfusion-fast ")


def test_generate_hands_over_options(fake, tmp_path, capsys):
    out = str(tmp_path / "o")
    options = ["--steps", "9", "--field.levels", "8", "--optim.lr-table", "1e-3", "--loss.opacity.end", "0.5"]
    assert cli.main(["generate", "a tea pot", "--out", out, *options, "--log.no-tensorboard"]) == 0
    ((action, config, _),) = fake.told
    assert action == "run"
    assert (config.prompt, config.out, config.steps, config.field.levels) == ("a tea pot", out, 9, 8)
    assert (config.optim.lr_table, config.loss.opacity.end, config.log.tensorboard) == (1e-3, 0.5, False)
    assert config.loss.opacity.start == Config().loss.opacity.start
    assert f"done: {out}" in capsys.readouterr().out


def test_the_kind_of_field(fake, tmp_path, capsys, run_folder):
    assert cli.main(["generate", "x", "--field", "triplane", "--field.degree", "1", "--optim.lr-planes", "0.5"]) == 0
    config = fake.told[0][1]
    assert (config.field.kind, config.field.degree, config.field.resolution) == ("triplane", 1, 64)
    assert (config.field.hidden, config.field.blob_radius) == (Config().field.hidden, Config().field.blob_radius)
    assert config.optim.lr_planes == 0.5
    file = tmp_path / "triplane.yaml"
    config.save(file)
    assert cli.main(["generate", "x", "--config", str(file), "--field.features", "8"]) == 0
    assert fake.told[1][1] == dataclasses.replace(config, field=dataclasses.replace(config.field, features=8))
    assert cli.main(["generate", "x", "--config", str(file), "--field", "hash_grid", "--field.levels", "3"]) == 0
    assert (fake.told[2][1].field.kind, fake.told[2][1].field.levels) == ("hash_grid", 3)
    capsys.readouterr()
    assert fails(capsys, "generate", "x", "--field", "tree") == "error: --field: got tree, want hash_grid or triplane"
    line = fails(capsys, "generate", "x", "--field", "triplane", "--field.scenes", "2")
    assert line == "error: --field.scenes: got 2, want 1: a run makes one scene"
    line = fails(capsys, "generate", "--resume", str(run_folder.path), "--field", "triplane")
    assert line == "error: give --field or --resume, not both; a resumed run has its own field"
    line = fails(capsys, "generate", "x", "--field", "triplane", "--field.levels", "3")
    assert "--field.levels" in line


def test_what_a_run_starts_from(fake, tmp_path, capsys):
    file = str(write_amortised(tmp_path / "net.gz"))
    cli.main(["generate", "x", "--init", file, "--init-code", "5", "--steps", "3", "--field", "triplane"])
    first = fake.told[0][1]
    assert (first.init, first.init_code, first.steps, first.field.kind) == (file, 5, 3, "triplane")
    first.save(tmp_path / "config.yaml")
    cli.main(["generate", "x", "--config", str(tmp_path / "config.yaml"), "--init", "scratch"])
    last = fake.told[1][1]
    assert (last.init, last.init_code, last.field.kind) == ("scratch", 5, "triplane")
    cli.main(["generate", "x"])
    assert fake.told[2][1].init == "amortised"
    capsys.readouterr()


def test_a_file_to_start_from_that_cannot_be_is_one_line(tmp_path, capsys, run_folder):
    line = fails(capsys, "generate", "x", "--init", str(tmp_path / "none.gz"))
    assert line.startswith(f"error: --init {tmp_path / 'none.gz'}: cannot be read (No such file or directory); want ")
    line = fails(capsys, "generate", "--resume", str(run_folder.path), "--init", "scratch")
    assert line == "error: give --init or --resume, not both; a resumed run has its own field"
    line = fails(capsys, "generate", "x", "--init-code", "-1")
    assert "--init-code" in line


def test_memory_and_profile(fake):
    assert cli.main(["generate", "x", "--memory", "16GB", "--profile"]) == 0
    assert cli.main(["generate", "x", "--memory", "16000000000"]) == 0
    assert cli.main(["generate", "x"]) == 0
    assert [(config.memory, config.profile) for _, config, _ in fake.told] == [
        ("16GB", True),
        ("16000000000", False),
        (None, False),
    ]


def test_command_line_wins_over_the_file(fake, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("prompt: a chair\nsteps: 5\nbatch: 3\n")
    assert cli.main(["generate", "--config", str(file), "--steps", "6", "--device", "cpu"]) == 0
    assert cli.main(["generate", "a table", f"--config={file}"]) == 0
    (_, first, _), (_, second, _) = fake.told
    assert (first.prompt, first.steps, first.batch, first.device) == ("a chair", 6, 3, "cpu")
    assert (second.prompt, second.steps, second.batch) == ("a table", 5, 3)


def test_resume_takes_the_saved_config(fake, run_folder):
    assert cli.main(["generate", "--resume", str(run_folder.path), "--steps", "80"]) == 0
    ((_, config, folder),) = fake.told
    assert (config.prompt, config.steps, folder) == ("a chair", 80, run_folder.path)


@pytest.mark.parametrize("command", ["generate", "export"])
def test_agreement_is_said_and_a_low_one_warns(fake, run_folder, capsys, monkeypatch, command):
    arguments = {"generate": ["generate", "--resume"], "export": ["export"]}[command] + [str(run_folder.path)]
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    assert said.out == (
        f"mesh agrees with the render: 0.98 (covers 0.99 of it, colours differ by 0.03)\ndone: {run_folder.path}\n"
    )
    assert said.err == ""
    monkeypatch.setattr(fake, "agreement", Agreement(iou=0.72, covered=0.75, color=0.1))
    assert cli.main(arguments) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: mesh and render agree only to 0.72")


def test_export_takes_the_saved_settings(fake, run_folder, tmp_path):
    assert cli.main(["export", "--texture-size", "64", str(run_folder.path)]) == 0
    assert cli.main(["export", str(run_folder.path), "--threshold", "4", "--out", str(tmp_path / "other")]) == 0
    (_, first, here), (_, second, there) = fake.told
    assert (first.export.resolution, first.export.texture_size, first.steps) == (99, 64, 77)
    assert (second.export.threshold, second.export.texture_size) == (4.0, Config().export.texture_size)
    assert (here, there) == (run_folder.path, tmp_path / "other")
    assert there.is_dir()


def test_wrong_generate_options_are_one_line(capsys, tmp_path, run_folder):
    assert "the prompt is empty" in fails(capsys, "generate", " ")
    assert "the prompt is empty" in fails(capsys, "generate")
    assert "--nope" in fails(capsys, "generate", "x", "--nope", "3")
    assert "--steps: invalid literal" in fails(capsys, "generate", "x", "--steps", "abc")
    assert "--steps: got 0, want at least 1" in fails(capsys, "generate", "x", "--steps", "0")
    assert "--export.resolution: got 2, want 8 to 1024" in fails(capsys, "generate", "x", "--export.resolution", "2")
    assert "--loss.opacity.begin: got 2.0, want 0 to 1" in fails(capsys, "generate", "x", "--loss.opacity.begin", "2")
    assert "cannot read config" in fails(capsys, "generate", "x", "--config", str(tmp_path / "absent.yaml"))
    (tmp_path / "bad.yaml").write_text("stepz: 3")
    assert "did you mean steps?" in fails(capsys, "generate", "x", "--config", str(tmp_path / "bad.yaml"))
    assert "not both" in fails(capsys, "generate", "--config", "a", "--resume", "b")
    for option in ("--config", "--resume", "--guidance.name"):
        assert f"{option}: expected one argument" in fails(capsys, "generate", "x", option)
    assert "is no folder" in fails(capsys, "generate", "--resume", str(tmp_path / "absent"))
    assert "holds no checkpoint.safetensors" in fails(capsys, "generate", "--resume", str(tmp_path))
    assert "'a chair'" in fails(capsys, "generate", "a table", "--resume", str(run_folder.path))
    assert "omit --out" in fails(capsys, "generate", "--resume", str(run_folder.path), "--out", str(tmp_path))
    assert "unknown device 'gpu'" in fails(capsys, "generate", "x", "--device", "gpu")
    assert "memory has to be a size such as 16GB" in fails(capsys, "generate", "x", "--memory", "lots")


@pytest.mark.parametrize(
    ("arguments", "begins"),
    [
        (("--optim.betas", "0.9", "0.99", "0.9"), "--optim.betas takes no more values, and 0.9 is one too many"),
        (("--optim.betas", "0.9", "0.99", "--optim.lr-mlp", "0.99", "0.99"), "--optim.lr-mlp takes no more values"),
        (("--steps", "3", "-4"), "--steps takes no more values, and -4 is one too many"),
        (("armchair", "--steps", "3"), "armchair is one too many; a prompt or path of several words goes in quotes"),
        (("--steps", "3", "--nope", "4", "x"), "Unrecognized options: --nope, 4, x"),
    ],
)
def test_a_value_too_many_is_said_to_be_one(capsys, arguments, begins):
    assert fails(capsys, "generate", "an", *arguments).startswith(f"error: {begins}")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_terminal_without_frames_gets_the_same_line(encoding):
    command = [sys.executable, "-m", "dreamfusion_fast.cli", "generate", "x", "--steps", "abc"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    line = "--steps: invalid literal for int() with base 10: 'abc'; see dreamfusion-fast generate --help"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {line}\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU")
@pytest.mark.parametrize("command", ["generate", "sample"])
def test_absent_gpu(capsys, command):
    line = fails(capsys, command, "x", "--device", "cuda")
    assert "device cuda was asked for, but" in line
    assert "use --device cpu" in line


def test_wrong_commands_and_export_options(capsys, run_folder, tmp_path):
    assert "did you mean generate?" in fails(capsys, "generat", "x")
    assert 'dreamfusion-fast generate "a teapot"' in fails(capsys, "a teapot")
    assert "is no folder" in fails(capsys, "export", str(tmp_path / "absent"))
    assert "RUN" in fails(capsys, "export")
    assert "--resolution" in fails(capsys, "export", str(run_folder.path), "--resolution", "x")
    assert "--threshold: got -1.0, want above 0" in fails(capsys, "export", str(run_folder.path), "--threshold", "-1")
    (tmp_path / "file").write_text("")
    assert "is a file" in fails(capsys, "export", str(run_folder.path), "--out", str(tmp_path / "file"))
    run_folder.config.write_text("prompt: [")
    assert "no valid YAML" in fails(capsys, "export", str(run_folder.path))


def test_what_a_terminal_obeys_is_escaped(capsys, run_folder):
    """Wherever it comes from: here, a checkpoint of somebody else."""
    metadata = {"format": "dreamfusion_fast checkpoint", "version": "\x1b[2J\x9b1"}
    save_file({"a": torch.zeros(3)}, run_folder.checkpoint, metadata=metadata)
    run_folder.config.unlink()  # so that the checkpoint is read at once
    assert r"has format \x1b[2J\x9b1" in fails(capsys, "generate", "--resume", str(run_folder.path))
    with cli._shown_log():
        logging.getLogger("dreamfusion_fast.test").info("two\nlines of \x1b[2J")
    assert capsys.readouterr().err == "two\nlines of \\x1b[2J\n"


def test_errors_in_the_run_are_one_line(capsys, fake):
    fake.error = UserError("the loss is\nnot finite")
    assert fails(capsys, "generate", "x") == "error: the loss is not finite"
    fake.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")
    assert "out of memory (Tried to allocate a lot); close what else uses it" in fails(capsys, "generate", "x")


def test_bugs_and_debug_show_a_traceback(fake, monkeypatch):
    fake.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["generate", "x"])
    fake.error = UserError("a mistake")
    with pytest.raises(UserError, match="a mistake"):
        cli.main(["generate", "x", "--debug"])
    monkeypatch.setenv("DREAMFUSION_FAST_DEBUG", "1")
    with pytest.raises(UserError, match="a mistake"):
        cli.main(["generate", "x"])


def test_interrupt_is_130(capsys, fake):
    fake.error = KeyboardInterrupt()
    assert cli.main(["generate", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.fixture
def fake_prior(monkeypatch):
    told = []

    def sample_images(*arguments):
        told.append(arguments)
        return np.arange(arguments[1], dtype=np.uint8)[:, None, None, None].repeat(64, 1).repeat(64, 2).repeat(3, 3)

    module = types.ModuleType("dreamfusion_fast.guidance.models.embedded.sample")
    module.sample_images = sample_images
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return told


def test_sample_writes_a_grid(fake_prior, tmp_path):
    out = tmp_path / "new" / "grid.png"
    assert cli.main(["sample", "a chair", "-n", "5", "--out", str(out), "--seed", "3", "--device", "cpu"]) == 0
    ((prompt, n, seed, _, steps, device, folder),) = fake_prior
    assert (prompt, n, seed, device, folder) == ("a chair", 5, 3, "cpu", None)
    assert steps > 0
    picture = np.array(Image.open(out))
    assert picture.shape == (128, 192, 3)
    assert picture[0, ::64, 0].tolist() == [0, 1, 2]
    assert picture[64, ::64, 0].tolist() == [3, 4, 255]


def test_sample_overwrites_only_when_told(capsys, fake_prior, tmp_path):
    out = tmp_path / "grid.png"
    out.write_text("mine")
    assert "exists; choose another" in fails(capsys, "sample", "a chair", "--out", str(out))
    assert out.read_text() == "mine"
    assert fake_prior == []
    assert cli.main(["sample", "a chair", "--out", str(out), "--overwrite"]) == 0
    assert Image.open(out).size == (192, 192)
    assert os.listdir(tmp_path) == ["grid.png"]


def test_wrong_sample_options_are_one_line(capsys, fake_prior, tmp_path):
    assert "the prompt is empty" in fails(capsys, "sample", "")
    assert "PROMPT" in fails(capsys, "sample")
    assert "--n: got 0, want 1 to 1024" in fails(capsys, "sample", "x", "-n", "0")
    assert "--steps: got 0, want 1 to 1000" in fails(capsys, "sample", "x", "--steps", "0")
    assert "--guidance-scale: got nan" in fails(capsys, "sample", "x", "--guidance-scale", "nan")
    assert "--steps: got 1000000000, want 1 to" in fails(capsys, "sample", "x", "--steps", "1000000000")
    assert "has to end in .png" in fails(capsys, "sample", "x", "--out", "a.jpg")
    (tmp_path / "file").write_text("")
    assert "is a file" in fails(capsys, "sample", "x", "--out", str(tmp_path / "file" / "a.png"))
    assert fake_prior == []


def test_installed_command_prints_one_line_and_exits_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "dreamfusion_fast.cli", "generate", ""], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: the prompt is empty")
    assert done.stderr.count("\n") == 1
