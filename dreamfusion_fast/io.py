"""Files: whole or not at all, and the rules of a run folder.

A run folder holds everything one run wrote. Nothing in it is ever overwritten by another run: `prepare_run_folder`
refuses a folder that already holds one, `open_run_folder` refuses a folder that holds none.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dreamfusion_fast.errors import UserError, one_line


def user_path(given: str | os.PathLike[str], name: str) -> Path:
    """The path that a person gave, "~" expanded. Whether something is there is left to the caller.

    Args:
        given: the path.
        name: for the message, such as "output folder".

    Raises:
        UserError: no path of this system: a NUL in it, too long, "~" of an unknown user, a folder that may not be
            looked into.
    """
    try:
        path = Path(given).expanduser()
        os.stat(path)
        return path
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, RuntimeError, ValueError) as error:  # the latter two are pathlib's, and the system's for a NUL
        why = error.strerror if isinstance(error, OSError) else one_line(error)
        raise UserError(f"{name} {one_line(repr(os.fspath(given)))}: {why}") from error


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes its name when the block ends without an exception.

    The temporary file keeps the suffix (writers choose a format by it) and is removed when the block raises,
    KeyboardInterrupt included, so a reader sees the old file or the new one and never a part. Folders above `path` have
    to exist.
    """
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only the owner can read; results should be as readable as any other file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


class RunFolder:
    """The folder of one run and the paths of its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoint = path / "checkpoint.safetensors"  # parameters, optimiser state and step
        self.mesh = path / "mesh.glb"
        self.turntable = path / "turntable.mp4"
        self.preview = path / "preview.png"
        self.tensorboard = path / "tensorboard"  # a folder of event files

    def existing(self) -> list[Path]:
        """Those of the files above that exist."""
        names = (self.config, self.checkpoint, self.mesh, self.turntable, self.preview, self.tensorboard)
        return [name for name in names if os.path.lexists(name)]


def prepare_run_folder(path: str | os.PathLike[str]) -> RunFolder:
    """Make the folder of a new run, or raise UserError where that is impossible or would overwrite an older run.

    A folder that holds other files only is taken as it is.
    """
    folder = RunFolder(user_path(path, "output folder"))
    used = folder.existing()
    if used:
        raise UserError(
            f"output folder {folder.path} already holds a run ({used[0].name}); "
            f"continue it with --resume {folder.path} or choose another with --out"
        )
    make_folder(folder.path)
    return folder


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder where there is none; UserError where that fails or no file can be written to it."""
    folder = user_path(path, "output folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output folder {folder} is a file; choose another with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make output folder {folder}: {error.strerror}; choose another with --out") from error
    check_writable(folder)
    return folder


def open_run_folder(path: str | os.PathLike[str], *, writable: bool = True) -> RunFolder:
    """Open the folder of an existing run; UserError where it holds none, or cannot be written to."""
    folder = RunFolder(user_path(path, "run folder"))
    if not folder.path.is_dir():
        raise UserError(f"{folder.path} is no folder; give the output folder of an earlier run")
    for needed in (folder.config, folder.checkpoint):
        if not needed.is_file():
            raise UserError(f"{folder.path} holds no {needed.name}; give the output folder of an earlier run")
    if writable:
        check_writable(folder.path)
    return folder


def check_writable(folder: Path) -> None:
    """Raise UserError where no file can be made in `folder`. Tried, since permission bits do not tell it all."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to folder {folder}: {error.strerror}; choose another with --out") from error


def default_run_folder(prompt: str, parent: str | os.PathLike[str] = "out") -> Path:
    """The first of out/<prompt>, out/<prompt>-2, ... that holds no run yet."""
    slug = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "run"
    path = Path(parent) / slug
    number = 1
    while RunFolder(path).existing():
        number += 1
        path = Path(parent) / f"{slug}-{number}"
    return path
