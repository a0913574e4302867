"""progress.json tells other processes where a run is."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fakes import BallGuidance, small_config

from dreamfusion_fast.errors import Interrupted
from dreamfusion_fast.training import progress as module
from dreamfusion_fast.training.callbacks import Callback
from dreamfusion_fast.training.generator import Generator
from dreamfusion_fast.training.progress import Progress, ProgressFile, read_progress
from dreamfusion_fast.training.sections import LogConfig


class Clock:
    """Time that passes when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module.time, "time", lambda: self.now + 1e9)


def read(path: Path) -> Progress:
    progress = read_progress(path)
    assert progress is not None
    return progress


def test_rate_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, path = Clock(monkeypatch), tmp_path / "progress.json"
    file = ProgressFile(path, 0.5)
    file.stage("steps", 40, 100)
    assert read(path) == Progress("steps", 40, 100, None, 1e9 + 100, 1e9 + 100)
    assert read(path).left is None
    for step in range(41, 51):
        clock.now += 0.2
        file.advance(step, {"sds": step / 10})
    found = read(path)  # of the ninth, since the tenth came 0.2 s later
    assert (found.done, found.rate, found.losses) == (49, pytest.approx(5.0), {"sds": 4.9})
    assert found.left == pytest.approx(51 / 5.0)
    clock.now += 0.1
    file.advance(100)  # the last one is always written
    assert (read(path).done, read(path).left) == (100, 0.0)
    file.stage("export", 0, 3)
    assert (read(path).stage, read(path).rate, read(path).losses) == ("export", None, {"sds": 5.0})


def test_the_rate_is_that_of_the_last_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, path = Clock(monkeypatch), tmp_path / "progress.json"
    file = ProgressFile(path, 0.5)
    file.stage("steps", 0, 1000)
    for step in range(1, 200):
        clock.now += 0.5 if step < 100 else 1.0
        file.advance(step)
    assert read(path).rate == pytest.approx(1.0)


def test_threads_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    file = ProgressFile(path, 0.0)
    file.stage("export", 0, 80)
    threads = [threading.Thread(target=lambda: [file.advance() for _ in range(10)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(path).done == 80
    assert os.listdir(tmp_path) == ["progress.json"]


def test_a_file_that_cannot_be_written_is_left(tmp_path: Path) -> None:
    file = ProgressFile(tmp_path / "absent" / "progress.json", 0.0)
    file.stage("steps", 0, 2)
    (tmp_path / "absent").mkdir()
    file.advance(1)
    assert os.listdir(tmp_path / "absent") == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": "steps", "more": 1}', "\0"])
def test_what_is_no_progress_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "progress.json").write_text(text)
    assert read_progress(tmp_path / "progress.json") is None
    assert read_progress(tmp_path / "absent") is None


class Seen(Callback):
    """Notes what the file says after each step."""

    def __init__(self, path: Path, stop_at: int = -1) -> None:
        self.path, self.stop_at, self.found = path, stop_at, list[Progress]()

    def on_step(self, trainer: Any, result: Any) -> None:
        self.found.append(read(self.path))
        if result.step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LogConfig(
        preview_every=0, checkpoint_every=0, tensorboard=False, progress_bar=False, log_every=2, progress_every=1e-9
    )
    path = tmp_path / "run" / "progress.json"
    seen = Seen(path, stop_at=3)
    config = small_config(out=str(tmp_path / "run"), steps=6, log=log)
    began = time.time()
    with pytest.raises(Interrupted):
        Generator(config, [seen], BallGuidance()).run()
    assert [(found.stage, found.done, found.total) for found in seen.found] == [
        ("steps", step, 6) for step in (1, 2, 3)
    ]
    assert seen.found[0].losses == {}
    assert seen.found[1].losses["sds"] > 0
    assert began <= seen.found[0].began <= seen.found[1].written <= time.time()
    assert (read(path).stage, read(path).done) == ("steps", 3)
    told: list[tuple[str, int, int]] = []
    write = module.write_text

    def noted(file: Path, text: str, durable: bool) -> None:
        values = json.loads(text)
        told.append((values["stage"], values["done"], values["total"]))
        write(file, text, durable)

    monkeypatch.setattr(module, "write_text", noted)
    Generator.resume(tmp_path / "run", guidance=BallGuidance()).run()
    c = config
    views = c.export.turntable_frames + c.export.preview_views
    assert told[0] == ("loading", 0, 0)
    assert told[1:5] == [("steps", step, 6) for step in (3, 4, 5, 6)]
    assert told[5:9] == [("firm", step, 3) for step in range(4)]
    assert told[9:-1] == [("export", view, views) for view in range(views + 1)]
    assert told[-1] == ("done", 0, 0)
    assert read(path).stage == "done"
