"""What a piece of code opens, runs and asks of the network, and a limit on its time.

Python's audit events tell of what Python opens. Libraries in Rust and C open files without one, so the kernel is asked
as well (inotify): of all that lies beside the folders that may be read.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dreamfusion_fast

# Of an attack that got through: a connection, a process, a class found for a pickle.
_FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "pickle.find_class")
_PACKAGE = os.path.dirname(dreamfusion_fast.__file__)  # a tree that is installed to be edited is in no path
_OURS = [sys.prefix, sys.base_prefix, *(path for path in sys.path if path), _PACKAGE, "/proc", "/sys", "/dev"]

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


_IN_OPEN, _IN_ISDIR = 0x20, 0x40000000
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows


@contextmanager
def opened_beside(folders: Sequence[Path]) -> Iterator[list[str]]:
    """The files that lie beside `folders`, or below what does, and were opened within it by whatever library."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if handle < 0:
        raise OSError(ctypes.get_errno(), "inotify_init1")
    names: dict[int, str] = {}
    allowed = {os.path.realpath(folder) for folder in folders}
    for parent in {os.path.dirname(folder) for folder in allowed}:
        for place, below, _ in os.walk(parent):
            below[:] = [name for name in below if os.path.join(place, name) not in allowed]
            if place not in allowed:
                names[libc.inotify_add_watch(handle, os.fsencode(place), _IN_OPEN)] = place
    found: list[str] = []
    try:
        assert min(names) >= 0, "no watch is left"
        yield found
    finally:
        try:
            events = os.read(handle, 1 << 20)
        except BlockingIOError:
            events = b""
        os.close(handle)
        while events:
            watch, mask, _, length = _EVENT.unpack_from(events)
            name = events[_EVENT.size : _EVENT.size + length].rstrip(b"\0")
            events = events[_EVENT.size + length :]
            if not mask & _IN_ISDIR:
                found.append(f"open {os.path.join(names.get(watch, '?'), os.fsdecode(name))}")


@contextmanager
def watched(*folders: Path, seconds: int = 10) -> Iterator[list[str]]:
    """The list of what was done within it and must not be: files opened outside `folders` and Python's own, and others.

    It is whole when the block has ended.
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
        with opened_beside(folders) as beside:
            yield found
    finally:
        found += [event for event in beside if event not in found]
        _seen = None
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before:
            signal.signal(number, handler)
