"""What a piece of code opens, runs and asks of the network, by Python's audit events, and a limit on its time."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Of an attack that got through: a connection, a process, a class found for a pickle.
_FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "pickle.find_class")
_OURS = [sys.prefix, sys.base_prefix, *(path for path in sys.path if path), "/proc", "/sys", "/dev"]

_allowed: list[str] = []
_seen: list[str] | None = None
_installed = False


class TooLongError(BaseException):
    """Not an Exception, which code under test may catch."""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event in _FORBIDDEN:
        _seen.append(f"{event} {arguments!r}"[:200])
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not any(path == root or path.startswith((root + os.sep, root + "-")) for root in _allowed):
            _seen.append(f"open {path}")
    elif event == "import" and "evil" in str(arguments[0]).lower():
        _seen.append(f"import {arguments[0]}")


@contextmanager
def watched(*folders: Path, seconds: int = 10) -> Iterator[list[str]]:
    """The list of what was done within it and must not be: files opened outside `folders` and Python's own, and others.

    Libraries in Rust open files without an audit event: of these only the result tells.
    """
    global _seen, _installed
    if not _installed:  # a hook stays for good
        sys.addaudithook(_hook)
        _installed = True

    def stop(number: int, frame: Any) -> None:
        raise TooLongError(f"more than {seconds} s")

    staged = os.path.join(tempfile.gettempdir(), "dreamfusion-fast")
    _allowed[:] = [*map(os.path.realpath, [*_OURS, *folders]), os.path.realpath(staged)]
    found: list[str] = []
    # Of the processor: others may use it, too. What waits and uses none is given longer.
    before = [(number, signal.signal(number, stop)) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(12 * seconds)
    _seen = found
    try:
        yield found
    finally:
        _seen = None
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before:
            signal.signal(number, handler)
