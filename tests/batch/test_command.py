"""`dreamfusion-fast batch`: options, and one line with exit code 2 for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dreamfusion_fast import cli
from dreamfusion_fast.batch import run
from dreamfusion_fast.batch.outcome import Outcome


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the batch was asked to run; runs of the prompt "bad" fail."""
    calls: list[Any] = []

    def run_batch(jobs: Any, config: Any, device: str) -> dict[str, Outcome]:
        calls.append((jobs, config, device))
        return {job.name: Outcome("a line" if job.config.prompt == "bad" else None) for job in jobs}

    monkeypatch.setattr(run, "run_batch", run_batch)
    return calls


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a chair\na table\n")
    return path


def test_options_are_those_of_all_rows(told: list[Any], file: Path, tmp_path: Path, capsys: Any) -> None:
    rows = tmp_path / "rows.yaml"
    rows.write_text("- a chair\n- {prompt: a lamp, steps: 3}\n- {prompt: a bed, preset: dreamfusion}\n")
    words = [
        "--out",
        str(tmp_path / "o"),
        "--steps",
        "5",
        "--gpus-per-run",
        "0.25",
        "--workers",
        "3",
        "--device",
        "cpu",
    ]
    assert cli.main(["batch", str(rows), *words]) == 0
    ((jobs, config, device),) = told
    assert [job.config.steps for job in jobs] == [5, 3, 5]
    assert jobs[2].config.guidance.name == "deepfloyd-if"
    assert (config.out, config.gpus_per_run, config.workers, device) == (str(tmp_path / "o"), 0.25, 3, "cpu")
    assert capsys.readouterr().out == f"3 of 3 came out; done: {tmp_path}/o/index.html\n"


def test_a_failed_run_makes_the_exit_code_1(told: list[Any], file: Path, capsys: Any) -> None:
    file.write_text("a chair\nbad\n")
    assert cli.main(["batch", str(file)]) == 1
    assert "1 of 2 came out; see runs/index.html" in capsys.readouterr().out


def fails(capsys: Any, *words: str) -> str:
    assert cli.main(["batch", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_wrong_options_are_one_line(told: list[Any], file: Path, capsys: Any) -> None:
    assert "give the file of prompts first" in fails(capsys)
    assert "give the file of prompts first" in fails(capsys, "--steps", "3", str(file))
    assert "a chair is one too many; prompts are in the file" in fails(capsys, str(file), "a chair")
    assert "--gpus-per-run: got 0.0, want above 0" in fails(capsys, str(file), "--gpus-per-run", "0")
    assert "--gpus-per-run: got 2.0" in fails(capsys, str(file), "--gpus-per-run", "2")
    assert "invalid float value: 'x'" in fails(capsys, str(file), "--gpus-per-run", "x")
    assert "--workers: got 0, want at least 1" in fails(capsys, str(file), "--workers", "0")
    assert "--device: got cuda:1, want auto, cpu or cuda" in fails(capsys, str(file), "--device", "cuda:1")
    assert "--steps: got 0" in fails(capsys, str(file), "--steps", "0")
    assert "unknown preset 'x'" in fails(capsys, str(file), "--preset", "x")
    assert "cannot read" in fails(capsys, f"{file}.absent")
    assert told == []


def test_every_problem_of_the_file_has_a_line(told: list[Any], tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "rows.yaml"
    file.write_text("- {prompt: a, stepz: 1}\n- {prompt: b, steps: 0}\n")
    said = fails(capsys, str(file)).splitlines()
    assert said == [
        f"{file} line 2: steps: got 0, want at least 1",
        f"error: {file} line 1: unknown key stepz; did you mean steps? (and 1 more problems)",
    ]
    assert told == []


def test_help_says_how_rows_are_written(capsys: Any) -> None:
    assert cli.main(["batch", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--gpus-per-run" in printed
    assert "--optim.lr-table" in printed
