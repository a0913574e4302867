"""The queue: what runs, what waits, what becomes of a run, and what the next server knows of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from app_helpers import FAKE, until

from dreamfusion_fast.app import jobs as module
from dreamfusion_fast.app.jobs import Jobs
from dreamfusion_fast.app.runs import Runs
from dreamfusion_fast.errors import UserError
from dreamfusion_fast.training.config import Config


def state(jobs: Jobs, name: str) -> str:
    return jobs.run(name).state


def go(jobs: Jobs, name: str) -> None:
    (jobs.runs.folder / name / "go").touch()


def arguments(jobs: Jobs, name: str) -> list[str]:
    return json.loads((jobs.runs.folder / name / "arguments.json").read_text())


def test_one_runs_and_the_others_wait(jobs: Jobs) -> None:
    names = [jobs.submit(Config(prompt=f"thing {index}")) for index in range(3)]
    assert names == ["thing-0", "thing-1", "thing-2"]
    until(lambda: state(jobs, names[0]) == "running")
    assert [state(jobs, name) for name in names[1:]] == ["waiting", "waiting"]
    assert [jobs.place(name) for name in names] == [0, 0, 1]
    progress = jobs.run(names[0]).progress
    assert progress is not None
    assert (progress.stage, progress.total) == ("steps", 1000)
    until(lambda: jobs.run(names[0]).progress.done > progress.done)  # type: ignore[union-attr]
    go(jobs, names[0])
    until(lambda: state(jobs, names[0]) == "done")
    until(lambda: state(jobs, names[1]) == "running")
    assert state(jobs, names[2]) == "waiting"
    assert [run.name for run in jobs.all()] == names[::-1]


def test_the_same_prompt_twice_is_two_runs(jobs: Jobs) -> None:
    assert [jobs.submit(Config(prompt="a cup!")) for _ in range(2)] == ["a-cup", "a-cup-2"]


def test_the_queue_has_an_end(jobs: Jobs, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_LONGEST", 1)
    first = jobs.submit(Config(prompt="x"))
    until(lambda: state(jobs, first) == "running")
    jobs.submit(Config(prompt="y"))
    with pytest.raises(UserError, match="1 runs wait already; z can be resumed when there are fewer"):
        jobs.submit(Config(prompt="z"))
    assert state(jobs, "z") == "stopped"


def test_a_prompt_is_no_part_of_a_command(jobs: Jobs) -> None:
    prompt = "--out /tmp/x; $(touch x) `touch y` ../../z"
    name = jobs.submit(Config(prompt=prompt, seed=3))
    assert "/" not in name
    until(lambda: state(jobs, name) == "running")
    given = arguments(jobs, name)
    assert given[0] == "generate"
    assert not any("touch x" in word or "/tmp/x" in word for word in given)
    saved = Config.load(given[given.index("--config") + 1])
    assert (saved.prompt, saved.seed) == (prompt, 3)


def test_stop_asks_once_and_resume_goes_on(jobs: Jobs) -> None:
    name = jobs.submit(Config(prompt="x"))
    until(lambda: state(jobs, name) == "running")
    jobs.stop(name)
    assert state(jobs, name) == "stopping"
    jobs.stop(name)
    until(lambda: state(jobs, name) == "stopped")
    assert json.loads((jobs.runs.folder / name / "signals.json").read_text()) == [signal.SIGTERM]
    jobs.stop(name)  # nothing is left to stop
    jobs.resume(name)
    until(lambda: state(jobs, name) == "running")
    given = arguments(jobs, name)
    assert given[:3] == ["generate", "--resume", str(jobs.runs.folder / name)]
    assert "--log.progress-every" in given
    with pytest.raises(UserError, match="x is running; one that was stopped or has failed can go on"):
        jobs.resume(name)
    go(jobs, name)
    until(lambda: state(jobs, name) == "done")
    with pytest.raises(UserError, match="x is done"):
        jobs.resume(name)


def test_one_that_waits_leaves_the_queue(jobs: Jobs) -> None:
    first, second = (jobs.submit(Config(prompt=prompt)) for prompt in "xy")
    until(lambda: state(jobs, first) == "running")
    jobs.stop(second)
    assert state(jobs, second) == "stopped"
    go(jobs, first)
    until(lambda: state(jobs, first) == "done")
    assert state(jobs, second) == "stopped"
    jobs.resume(second)  # from its beginning: it has none yet
    until(lambda: state(jobs, second) == "running")
    assert "--config" in arguments(jobs, second)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("fails early", "nothing can be loaded"),
        ("fails", "no surface"),
        ("crashes", "it was killed by signal 9; log.txt in its folder has more"),
    ],
)
def test_a_failure_is_said_and_the_next_one_runs(jobs: Jobs, prompt: str, error: str) -> None:
    name, after = (jobs.submit(Config(prompt=each)) for each in (prompt, "after"))
    go(jobs, name)
    until(lambda: state(jobs, name) == "failed")
    assert jobs.run(name).error == error
    until(lambda: state(jobs, after) == "running")
    assert Jobs(jobs.runs, FAKE).run(name).error == error  # of another server, too


def test_a_process_that_cannot_be_started_is_a_failure(runs: Runs) -> None:
    jobs = Jobs(runs, ["/no/such/program"])
    name = jobs.submit(Config(prompt="x"))
    until(lambda: state(jobs, name) == "failed")
    assert "could not be started: No such file" in jobs.run(name).error
    jobs.close()


def test_the_next_server_finds_what_was_cut(runs: Runs) -> None:
    first = Jobs(runs, FAKE)
    cut, waiting = (first.submit(Config(prompt=prompt)) for prompt in ("cut", "waiting"))
    until(lambda: state(first, cut) == "running")
    first.close()
    with pytest.raises(UserError, match="the server is ending"):
        first.submit(Config(prompt="late"))
    second = Jobs(runs, FAKE)
    assert [state(second, name) for name in (cut, waiting)] == ["stopped", "stopped"]
    second.resume(cut)
    until(lambda: state(second, cut) == "running")
    assert "--resume" in arguments(second, cut)
    second.close()


def test_a_run_of_another_process_is_shown_waited_for_and_stopped(jobs: Jobs) -> None:
    """Such as that of a server that was killed."""
    path = jobs.runs.folder / "other"
    path.mkdir()
    (path / "job.yaml").write_text("prompt: other\n")
    process = subprocess.Popen([*FAKE, "generate", "--out", str(path)], stderr=subprocess.DEVNULL)
    try:
        until(lambda: state(jobs, "other") == "running")
        name = jobs.submit(Config(prompt="x"))
        assert state(jobs, name) == "waiting"
        jobs.stop("other")
        assert state(jobs, "other") == "stopping"
        jobs.stop("other")
        assert process.wait(60) == 128 + signal.SIGTERM
        assert state(jobs, "other") == "stopped"
        until(lambda: state(jobs, name) == "running")
    finally:
        process.kill()


def test_one_of_another_machine_is_left_alone(jobs: Jobs, monkeypatch: Any) -> None:
    name = jobs.submit(Config(prompt="x"))
    until(lambda: state(jobs, name) == "running")
    other = Jobs(jobs.runs, FAKE)
    monkeypatch.setattr(module.socket, "gethostname", lambda: "elsewhere")
    with pytest.raises(UserError, match=r"x is run by process \d+ on .*; stop it there"):
        other.stop(name)
    assert state(jobs, name) == "running"


def test_no_folder_can_be_made(runs: Runs, monkeypatch: Any) -> None:
    jobs = Jobs(runs, FAKE)
    runs.folder.rmdir()
    with pytest.raises(UserError, match="cannot make a folder in"):
        jobs.submit(Config(prompt="x"))
    jobs.close()


def test_the_command_is_this_package_wherever_it_is_started(tmp_path: Path) -> None:
    (tmp_path / "dreamfusion_fast").mkdir()  # as in a source tree that is not what is installed
    (tmp_path / "dreamfusion_fast" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    done = subprocess.run(
        [*module.COMMAND, "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.startswith("dreamfusion-fast "), done.stderr
    assert os.listdir(tmp_path) == ["dreamfusion_fast"]
