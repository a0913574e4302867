"""Output that cannot end a run: a full disk, a closed pipe or a letter that a terminal lacks is no error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast


class UnfailingStream:
    """A text stream whose `write` and `flush` never raise; the rest is that of the stream within.

    Letters that its encoding lacks are written as escapes.

    Attributes:
        error: why writing failed last; None: it has not.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self.error = error
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def unfailing(stream: TextIO) -> UnfailingStream:
    """`stream` as one that cannot fail, or itself where it is one."""
    return stream if isinstance(stream, UnfailingStream) else UnfailingStream(stream)


@contextmanager
def unfailing_output() -> Iterator[None]:
    """Keep stdout and stderr from failing in the block. Output that they cannot take is dropped."""
    # A stream is None where the process was started without; print would take stdout for stderr then.
    with open(os.devnull, "w") as nowhere:
        streams = [unfailing(stream or nowhere) for stream in (sys.stdout, sys.stderr)]
        out, err = (cast(TextIO, stream) for stream in streams)
        try:
            with redirect_stdout(out), redirect_stderr(err):
                yield
        finally:
            for stream in streams:
                stream.error = None
                stream.flush()
                if stream.error is not None:
                    with suppress(OSError, ValueError):  # it has no descriptor
                        # Python flushes once more when it exits, and would complain.
                        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
