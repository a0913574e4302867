"""The folder of runs: what is found in it, and what cannot be reached through it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dreamfusion_fast.app.runs import Runs
from dreamfusion_fast.errors import UserError
from dreamfusion_fast.io import claimed


def made(runs: Runs, name: str, **files: str) -> Path:
    path = runs.folder / name
    path.mkdir()
    for file, text in files.items():
        (path / file.replace("_", ".")).write_text(text)
    return path


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../out", "a/b", "/etc", "a\0b", "a\\b", ".hidden", "x" * 300, None, 3, ["a"], "absent"]
)
def test_what_is_no_run_is_refused(runs: Runs, name: object) -> None:
    made(runs, ".hidden", job_yaml="prompt: x")
    with pytest.raises(UserError, match="run"):
        runs.path(name)
    with pytest.raises(UserError, match="run"):
        runs.file(name, "mesh")


def test_links_are_no_way_out(runs: Runs, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "job.yaml").write_text("prompt: x")
    (outside / "mesh.glb").write_text("a secret")
    (runs.folder / "link").symlink_to(outside)
    with pytest.raises(UserError, match="no run called 'link'"):
        runs.file("link", "mesh")
    path = made(runs, "real", job_yaml="prompt: x")
    (path / "mesh.glb").symlink_to(outside / "mesh.glb")
    (path / "preview.png").mkdir()
    assert runs.file("real", "mesh") is None
    assert runs.file("real", "preview") is None
    assert runs.names() == ["real"]
    (path / "mesh.glb").unlink()
    (path / "mesh.glb").write_text("its own")
    assert runs.file("real", "mesh") == path / "mesh.glb"


def test_runs_of_the_command_line_are_there_too(runs: Runs) -> None:
    for index, name in enumerate(["old", "new"]):
        path = made(runs, name, checkpoint_safetensors="", config_yaml=f"prompt: 'the {name} one'\nsteps: 3\n")
        os.utime(path / "config.yaml", (1000 + index, 1000 + index))
    made(runs, "notes", readme_txt="no run")
    (runs.folder / "new" / "mesh.glb").write_text("glTF")
    assert runs.names() == ["new", "old"]
    assert [(runs.run(name).prompt, runs.run(name).state) for name in runs.names()] == [
        ("the new one", "done"),
        ("the old one", "stopped"),
    ]


def test_a_run_is_over_when_all_of_it_is_written(runs: Runs) -> None:
    path = made(runs, "a", job_yaml="prompt: a", checkpoint_safetensors="", mesh_glb="glTF")
    (path / "progress.json").write_text(json.dumps({"stage": "export", "done": 3, "total": 9}))
    assert runs.run("a").state == "stopped"  # pictures are missing
    (path / "progress.json").write_text(json.dumps({"stage": "done"}))
    assert runs.run("a").state == "done"
    with claimed(path):  # by an export, for example
        assert runs.run("a").state == "running"
    assert runs.run("a").state == "done"


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("step 3\nerror: it was too dark\n", "it was too dark"),
        ("error: first\ninterrupted\n", ""),
        ("x" * 10_000 + "\nerror: \x1b[31mred\n\n", "\\x1b[31mred"),
        ("", ""),
    ],
)
def test_an_error_is_the_last_line_of_the_log(runs: Runs, log: str, error: str) -> None:
    made(runs, "a", job_yaml="prompt: a", log_txt=log)
    assert runs.run("a").error == error
    assert runs.run("a").state == ("failed" if error else "stopped")


@pytest.mark.parametrize("text", ["prompt: [1]\n", "a: *b", "- 3", "\0"])
def test_a_file_that_says_no_prompt_costs_only_that(runs: Runs, text: str) -> None:
    made(runs, "a", job_yaml=text, progress_json="{")
    assert (runs.run("a").prompt, runs.run("a").progress) == ("a", None)
