"""The words of the page are right, and everything that people wrote stays text."""

from __future__ import annotations

import dataclasses

import pytest

from dreamfusion_fast.app.runs import Run
from dreamfusion_fast.app.words import caption, duration, panel, queue, said, viewer
from dreamfusion_fast.training.progress import Progress

STEPS = Progress("steps", 250, 1000, rate=5.0, began=1000.0, written=1050.0, losses={"sds": 0.5})


def run(state: str, progress: Progress | None = None, **rest: str) -> Run:
    return Run("a-cup", "a cup", state, progress, **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7265, "2:01:05"), (-3, "0:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (run("waiting"), "waiting, 2 before it"),
        (run("starting"), "starting"),
        (run("running"), "running"),
        (run("running", STEPS), "step 250 of 1000 · 5.0 a second · 2:20 left, then the mesh"),  # 150 s, 10 s ago
        (run("running", dataclasses.replace(STEPS, rate=None)), "step 250 of 1000 · for 1:00"),
        (run("running", Progress("loading", began=1055.0)), "loading the diffusion model · for 0:05"),
        (run("running", Progress("export", 7, 68, rate=61.0, written=1060.0)),
         "mesh and pictures, view 7 of 68 · 61.0 a second · 0:01 left"),
        (run("running", Progress("done")), "ending"),
        (run("stopping", STEPS), "stopping: it saves itself"),
        (run("stopped", STEPS), "stopped at step 250 of 1000; it can go on"),
        (run("stopped", Progress("export")), "stopped; it can go on"),
        (run("failed", STEPS, error="no surface"), "failed: no surface"),
        (run("done", Progress("done")), "done"),
    ],
)  # fmt: skip
def test_what_a_run_does(shown: Run, text: str) -> None:
    assert said(shown, place=2, now=1060.0) == text


def test_what_people_wrote_is_text() -> None:
    evil = "<img src=x onerror=alert(1)>\"'"
    bad = Run(evil, evil, "failed", None, evil)
    for text in (panel(bad), queue([dataclasses.replace(bad, state="waiting")], [0]), viewer(None, evil), viewer(evil)):
        assert "<img" not in text
        assert "\"'" not in text
        assert "&lt;img" in text
    assert caption(Run("x", "p" * 100, "done")) == "done · " + "p" * 57 + "..."


def test_the_queue_has_what_goes_on_first() -> None:
    runs = [
        Run("c", "third", "waiting"),
        Run("b", "second", "waiting"),
        Run("a", "first", "running"),
        Run("o", "over", "done"),
    ]
    text = queue(runs, [1, 0, 0, 0])
    assert text.index("first") < text.index("second") < text.index("third")
    assert "over" not in text
    assert "empty" in queue(runs[3:], [0])
    assert "stopped" not in text
    cut = [Run("s", "s", "stopped"), Run("t", "t", "stopped")]
    assert "2 of the runs below were stopped; select one to resume it" in queue(cut, [0, 0])


def test_the_mesh_can_do_nothing_to_the_page() -> None:
    assert 'sandbox="allow-scripts"' in viewer("<p>")
    assert "allow-same-origin" not in viewer("<p>")
