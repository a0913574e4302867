"""The queue: one run at a time, each a process of its own, so that a run outlives pages, and its errors are its own.

What a run is, its folder says. Here is only which of them wait, and which process is theirs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dreamfusion_fast.app.runs import ASKED, LOG, Run, Runs, State
from dreamfusion_fast.errors import UserError
from dreamfusion_fast.io import RunFolder
from dreamfusion_fast.training.config import Config

_log = logging.getLogger(__name__)

# The same package as this process has, whatever folder it is in: python -m would look there first.
_MAIN = "import sys; sys.path[0] = sys.argv.pop(1); from dreamfusion_fast.cli import main; sys.exit(main())"
COMMAND = (sys.executable, "-c", _MAIN, str(Path(__file__).parents[2]))
"""The command line as a process; its arguments come behind."""
_PROGRESS_EVERY = 0.25  # seconds
_LOG_OPTIONS = ("--log.progress-every", str(_PROGRESS_EVERY), "--log.no-progress-bar")
_LONGEST = 100  # runs that wait
_LOOK = 1.0  # seconds between two looks at whether a run of another process has ended


@dataclass(frozen=True)
class _Process:
    """A run's process, and when it was started, seconds since 1970."""

    name: str
    process: subprocess.Popen[bytes]
    started: float


class Jobs:
    """Runs in a folder, started in the order that they were asked for.

    A run in this folder that another process has started, such as a server that was killed, is waited for. All methods
    may be called from any thread.

    Args:
        runs: the folder.
        command: that makes a run of the options behind it.
    """

    def __init__(self, runs: Runs, command: Sequence[str] = COMMAND) -> None:
        self.runs, self._command = runs, list(command)
        self._waiting: list[str] = []
        self._running: _Process | None = None
        self._stopping: set[str] = set()
        self._closed = False
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="jobs", daemon=True)
        self._worker.start()

    def submit(self, config: Config) -> str:
        """Queue a new run, and return its name.

        Raises:
            UserError: the config is refused, or its folder cannot be made.
        """
        config.check()
        try:
            path = self.runs.new(config.prompt)
            config.save(path / ASKED)
        except OSError as error:
            raise UserError(f"cannot make a folder in {self.runs.folder}: {error.strerror}") from error
        self._queue(path.name)
        return path.name

    def resume(self, name: str) -> None:
        """Queue a run that is over, to go on.

        Raises:
            UserError: there is no such run, or it is not over, or done.
        """
        run = self.run(name)
        if run.state not in ("stopped", "failed"):
            raise UserError(f"{name} is {run.state}; one that was stopped or has failed can go on")
        self._queue(name)

    def stop(self, name: str) -> None:
        """Ask a run to save itself and end, or take it out of the queue. Nothing happens to one that is over.

        Raises:
            UserError: there is no such run, or it is a process of another machine.
        """
        self.runs.path(name)
        with self._changed:
            if name in self._waiting:
                self._waiting.remove(name)
                return
            if name in self._stopping:  # a second signal would end it at once, and nothing would be saved
                return
            if self._running is not None and self._running.name == name:
                self._stopping.add(name)
                self._running.process.terminate()
                return
            holder = self.runs.holder(name)
            if holder is None:
                return
            held = re.match(r"process (\d+) on (\S+) since", holder)
            if held is None or held[2] != socket.gethostname():
                raise UserError(f"{name} is run by {holder}; stop it there")
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(held[1]), signal.SIGTERM)
            self._stopping.add(name)

    def run(self, name: str) -> Run:
        """A run as it is now; UserError where there is none."""
        return self.runs.run(name, self._known(name))

    def all(self) -> list[Run]:
        """The runs that wait or go on, and the latest of the others, the latest first."""
        found = []
        for name in self.runs.names():
            with contextlib.suppress(UserError):  # it was removed
                found.append(self.run(name))
        return found

    def place(self, name: str) -> int:
        """How many runs are before this one in the queue."""
        with self._changed:
            return self._waiting.index(name) if name in self._waiting else 0

    def close(self) -> None:
        """Stop the run that goes on, and wait until it has saved itself; those that wait are left as they are."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            running = self._running
            self._changed.notify_all()
        if running is not None:
            _log.info("waiting for %s to save itself", running.name)
            self.stop(running.name)
        self._worker.join()

    def _known(self, name: str) -> State | None:
        with self._changed:
            if name in self._waiting:
                return "waiting"
            ours = self._running if self._running is not None and self._running.name == name else None
            if ours is None and self.runs.holder(name) is None:
                self._stopping.discard(name)
                return None
            if name in self._stopping:
                return "stopping"
            return "starting" if ours is not None and self.runs.written(name) < ours.started else "running"

    def _queue(self, name: str) -> None:
        with self._changed:
            if self._closed:
                raise UserError("the server is ending")
            if len(self._waiting) >= _LONGEST:
                raise UserError(f"{_LONGEST} runs wait already; {name} can be resumed when there are fewer")
            if name not in self._waiting:
                self._waiting.append(name)
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._waiting or self._another_runs()):
                    self._changed.wait(_LOOK if self._waiting else None)
                if self._closed:
                    return
                name = self._waiting.pop(0)
                self._stopping.discard(name)
                process = self._start(name)
                if process is None:
                    continue
                self._running = _Process(name, process, time.time())
            code = process.wait()
            with self._changed:
                self._ended(name, code)
                self._running = None
                self._stopping.discard(name)

    def _another_runs(self) -> bool:
        return any(self.runs.holder(name) is not None for name in self.runs.names())

    def _start(self, name: str) -> subprocess.Popen[bytes] | None:
        path = self.runs.folder / name
        try:
            asked = path / ASKED
            if RunFolder(path).checkpoint.is_file():
                options = ["--resume", str(path), *_LOG_OPTIONS]
            else:
                options = ["--config", str(asked), "--out", str(path), *_LOG_OPTIONS]
            with (path / LOG).open("ab") as log:
                # A Ctrl-C in the terminal is the server's, which then asks once: a second signal ends it unsaved.
                return subprocess.Popen(
                    [*self._command, "generate", *options],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            _log.warning("%s cannot be started: %s", name, error)
            self._say(path, f"it could not be started: {error.strerror}")
            return None

    def _ended(self, name: str, code: int) -> None:
        """See to it that the log of a run that failed ends with an error."""
        if code == 0 or name in self._stopping or self.runs.run(name).error:
            return
        asked = code - 128 if code > 128 else 0
        if asked not in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            what = f"it was killed by signal {-code}" if code < 0 else f"it ended with exit code {code}"
            self._say(self.runs.folder / name, f"{what}; {LOG} in its folder has more")

    def _say(self, path: Path, error: str) -> None:
        with contextlib.suppress(OSError), (path / LOG).open("a", encoding="utf-8") as log:
            log.write(f"\nerror: {error}\n")
