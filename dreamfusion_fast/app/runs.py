"""The folder of all runs: what is in it, and what may be read of it. A run is known by the name of its folder."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dreamfusion_fast.errors import UserError, joined
from dreamfusion_fast.io import RunFolder, default_run_folders, holder
from dreamfusion_fast.settings import shown
from dreamfusion_fast.training.config_io import load_yaml
from dreamfusion_fast.training.progress import Progress, read_progress

ASKED, LOG = "job.yaml", "log.txt"
"""In a run's folder: the settings that were asked for, and what its process said."""

State = Literal["waiting", "starting", "running", "stopping", "stopped", "failed", "done"]
_MOST = 100  # runs that are listed, the latest
_TAIL = 4096  # bytes of a log that are looked at


@dataclass(frozen=True)
class Run:
    """A run as it is now.

    Attributes:
        name: of its folder.
        prompt: what it makes.
        state: waiting for its turn; starting; running; stopping: asked to, it still saves; stopped: it can go
            on; failed; done.
        progress: as it said last; None: it has not got so far.
        error: why it failed, one line.
        asked: when it was asked for, seconds since 1970.
    """

    name: str
    prompt: str
    state: State
    progress: Progress | None = None
    error: str = ""
    asked: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether nothing goes on."""
        return self.state in ("stopped", "failed", "done")


class Runs:
    """The folder.

    Args:
        folder: that is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def path(self, name: Any) -> Path:
        """The folder of the run called `name`.

        Raises:
            UserError: it is no name of a folder directly in this one, or there is no run. Links are not followed.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0.][^/\\\0]{0,254}", name):
            raise UserError(f"run: got {shown(name)}, want the name of a folder")
        path = self.folder / name
        if path.is_symlink() or not path.is_dir() or not _is_run(path):
            raise UserError(f"there is no run called {shown(name)}")
        return path

    def file(self, name: Any, kind: Literal["mesh", "turntable", "preview"]) -> Path | None:
        """A file of a run to be shown; None where there is none. A link is none.

        Raises:
            UserError: as `path`.
        """
        path: Path = getattr(RunFolder(self.path(name)), kind)
        return path if path.is_file() and not path.is_symlink() else None

    def new(self, prompt: str) -> Path:
        """Make the folder of a new run."""
        for path in default_run_folders(prompt, self.folder):
            try:
                path.mkdir()
                return path
            except FileExistsError:
                continue
        raise AssertionError("folders are without end")

    def names(self) -> list[str]:
        """Names of the latest runs, the latest first."""
        found = [
            (_asked(path), path.name)
            for path in self.folder.iterdir()
            if not path.name.startswith(".") and not path.is_symlink() and path.is_dir() and _is_run(path)
        ]
        return [name for _, name in sorted(found, reverse=True)[:_MOST]]

    def holder(self, name: str) -> str | None:
        """Who writes to a run's folder, as its lock says; None: nobody."""
        return holder(self.folder / name)

    def written(self, name: str) -> float:
        """When a run has written its progress last, seconds since 1970; 0: never."""
        try:
            return RunFolder(self.folder / name).progress.stat().st_mtime
        except OSError:
            return 0.0

    def run(self, name: str, state: State | None = None) -> Run:
        """A run by what is in its folder.

        Args:
            name: of the run.
            state: what is known of it; by default that is told by its files.

        Raises:
            UserError: as `path`.
        """
        path = self.path(name)
        folder = RunFolder(path)
        progress, error = read_progress(folder.progress), ""
        if state is None and self.holder(name) is not None:
            state = "running"
        if state is None:
            # A run by the command line has no progress.json: its mesh says that it came to an end.
            ended = folder.mesh.is_file() if progress is None else progress.stage == "done"
            error = "" if ended else _error(path / LOG)
            state = "done" if ended else "failed" if error else "stopped"
        return Run(name, _prompt(path), state, progress, error, _asked(path))


def _is_run(path: Path) -> bool:
    return (path / ASKED).is_file() or RunFolder(path).checkpoint.is_file()


def _settings(path: Path) -> Path:
    """The file of a run's settings, which is there from its beginning."""
    asked = path / ASKED
    return asked if asked.is_file() else RunFolder(path).config


def _asked(path: Path) -> float:
    try:
        return _settings(path).stat().st_mtime
    except OSError:
        return 0.0


def _prompt(path: Path) -> str:
    settings = _settings(path)
    try:
        return _prompt_in(settings, settings.stat().st_mtime_ns)
    except OSError:
        return path.name


@functools.lru_cache(4 * _MOST)
def _prompt_in(settings: Path, changed: int) -> str:
    try:
        values = load_yaml(settings)
    except UserError:
        return settings.parent.name
    prompt = values.get("prompt") if isinstance(values, dict) else None
    return prompt if isinstance(prompt, str) else settings.parent.name


def _error(log: Path) -> str:
    """The error that a log ends with; empty if it ends otherwise."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    last = next((line for line in reversed(lines) if line.strip()), "")
    return joined(last.removeprefix("error: ")) if last.startswith("error: ") else ""
