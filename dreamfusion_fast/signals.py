"""Signals that ask a process to end: Ctrl-C, the SIGTERM of a scheduler, the SIGHUP of a terminal that was closed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dreamfusion_fast.errors import Interrupted

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopRequest:
    """Whether a signal has asked for the end: `number` is that of the first one, None before it."""

    number: int | None = None

    def made(self) -> bool:
        return self.number is not None


@contextmanager
def stop_signals(deferred: bool = False) -> Iterator[StopRequest]:
    """Raise Interrupted for each of the signals in the block, in place of their earlier handlers.

    Outside the main thread, which alone may install handlers, nothing changes.

    Args:
        deferred: the first signal is only noted in what is yielded; a second one raises.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if not deferred or request.made():
            raise Interrupted(number)
        request.number = number

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            # nohup ignores SIGHUP on purpose. A shell ignores SIGINT in background jobs, but one that is sent there is
            # meant. None is a handler that Python could not restore.
            if handler is not None and (handler is not signal.SIG_IGN or number == signal.SIGINT):
                before[number] = signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
