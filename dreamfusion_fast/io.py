"""Files: whole or not at all, and the rules of a run folder.

A run folder holds everything one run wrote. Nothing in it is ever overwritten by another run: `claimed_new` refuses a
folder that already holds one, `open_run_folder` refuses a folder that holds none. Who writes to a folder has claimed it
(`claimed`): the lock is the kernel's, so it ends with its process, however that ends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import secrets
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dreamfusion_fast.errors import UserError, one_line

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

LOCK = ".dreamfusion-fast.lock"
"""In a claimed folder, the file that is locked. Its text names the holder."""


class TakenError(UserError):
    """The folder holds a run, or another run or export is writing to it."""


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
def atomic_path(path: str | os.PathLike[str], durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes its name when the block ends without an exception.

    The temporary file keeps the suffix (writers choose a format by it) and is removed when the block raises,
    KeyboardInterrupt included, so a reader sees the old file or the new one and never a part. Folders above `path` have
    to exist.

    Args:
        path: the file.
        durable: also where the machine fails, for which this waits for the disk.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem[:40]}.{secrets.token_hex(8)}.tmp{target.suffix}")
    # As open() does, so that the kernel applies the umask, which a process can read only by changing it.
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes, durable: bool = True) -> None:
    """Write `data` to `path`, as `atomic_path` does."""
    with atomic_path(path, durable) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str, durable: bool = True) -> None:
    """Write `text` as UTF-8 to `path`, as `atomic_path` does."""
    write_bytes(path, text.encode("utf-8"), durable)


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata, all of one and the same file.

    safetensors' own reader opens the path twice, for the header and for the data. A file that is put in place of
    another between the two would be read as a mixture of both. The tensors are sorted by name, see
    `safetensors_from_bytes`.

    Raises:
        OSError: the file cannot be read.
        safetensors.SafetensorError: it is no safetensors file.
    """
    return safetensors_from_bytes(Path(path).read_bytes())


def safetensors_from_bytes(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file's bytes, on the CPU, sorted by name, and its metadata.

    safetensors gives them in an order that changes from process to process, and so would messages that name some.

    Raises:
        safetensors.SafetensorError: it is no safetensors file.
    """
    from safetensors.torch import load  # imports torch, which most commands that write files do without

    tensors = load(data)  # which has checked the header
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(sorted(tensors.items())), header.get("__metadata__") or {}


class RunFolder:
    """The folder of one run and the paths of its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoint = path / "checkpoint.safetensors"  # parameters, optimiser state and step
        self.mesh = path / "mesh.glb"
        self.turntable = path / "turntable.mp4"
        self.preview = path / "preview.png"
        self.progress = path / "progress.json"  # where the run is; only with log.progress_every
        self.tensorboard = path / "tensorboard"  # a folder of event files

    @property
    def files(self) -> tuple[Path, ...]:
        """All of the above that are files."""
        return self.config, self.checkpoint, self.mesh, self.turntable, self.preview, self.progress

    def existing(self) -> list[Path]:
        """Those of the paths above that exist."""
        return [name for name in (*self.files, self.tensorboard) if os.path.lexists(name)]

    def check_unused(self) -> None:
        """Raise TakenError where the folder holds a run, or a part of one."""
        used = self.existing()
        if used:
            resume = f"continue it with --resume {self.path}" if self.checkpoint in used else "move it away"
            raise TakenError(
                f"output folder {self.path} already holds a run ({used[0].name}); {resume} or choose another with --out"
            )

    def remove_temporary(self) -> None:
        """Remove what `atomic_path` left of this folder's files in a process that was killed. Only for its holder."""
        names = "|".join(rf"{re.escape(file.stem)}\.[0-9a-f]{{16}}\.tmp{re.escape(file.suffix)}" for file in self.files)
        for name in os.listdir(self.path):
            if re.fullmatch(rf"\.(?:{names})", name):
                (self.path / name).unlink(missing_ok=True)


@contextmanager
def claimed(path: str | os.PathLike[str]) -> Iterator[RunFolder]:
    """Make the folder where there is none, and keep other runs and exports out of it until the block ends.

    Temporary files of a process that was killed are removed. A folder made here that is empty at the end is removed.

    Raises:
        TakenError: another process, or another claim of this one, holds the folder.
        UserError: it cannot be made or written to.
    """
    folder = RunFolder(user_path(path, "output folder"))
    made = not os.path.lexists(folder.path)
    lock = _lock(folder.path)
    try:
        folder.remove_temporary()
        yield folder
    finally:
        with contextlib.suppress(OSError):
            (folder.path / LOCK).unlink(missing_ok=True)  # before it is unlocked: from then on it may be another's
        os.close(lock)
        if made:
            with contextlib.suppress(OSError):
                folder.path.rmdir()


def _lock(folder: Path) -> int:
    """The descriptor of the folder's lock, held until it is closed or the process ends; errors as in `claimed`."""
    import fcntl  # not on Windows, where the rest of this module works

    attempts = 100  # a folder that takes no files, as in /proc, looks like one that is removed again and again
    while True:
        _make(folder)
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            attempts -= 1
            if isinstance(error, FileNotFoundError) and attempts:  # whoever made the folder has just removed it
                continue
            raise _not_writable(folder, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _said_by(lock) or "another process"
            os.close(lock)
            raise TakenError(
                f"output folder {folder} is in use by {holder}; wait until that has ended, or choose another with --out"
            ) from None
        except OSError as error:
            _log.warning("cannot lock %s (%s): see to it that nothing else writes to it", folder, error.strerror)
        try:
            found = os.stat(folder / LOCK)
            if (found.st_dev, found.st_ino) == (os.fstat(lock).st_dev, os.fstat(lock).st_ino):
                since = time.strftime("%Y-%m-%d %H:%M:%S %z")
                os.truncate(lock, 0)
                os.write(lock, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
                return lock
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(lock)
            raise _not_writable(folder, error) from error
        os.close(lock)  # a holder removed it between our open and our lock


def _said_by(lock: int) -> str:
    """The text of a lock that is open, on one line; empty where its holder has not written it yet."""
    return " ".join(os.read(lock, 400).decode(errors="replace").split())


def holder(path: str | os.PathLike[str]) -> str | None:
    """Who has claimed a folder, as its lock says: "process 123 on host since ..."; None: nobody has.

    Looking holds the lock for a moment, in which a claim by another process would be refused.
    """
    import fcntl

    try:
        lock = os.open(Path(path) / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _said_by(lock)
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(lock)


@contextmanager
def claimed_new(out: str | os.PathLike[str], prompt: str) -> Iterator[RunFolder]:
    """Claim the folder of a new run, as `claimed` does.

    Args:
        out: the folder; if empty, the first of `default_run_folders` that holds no run and that nobody has claimed.
        prompt: of the run.

    Raises:
        UserError: as `claimed`, and where the folder holds a run. One that holds other files only is taken as it is.
    """
    with contextlib.ExitStack() as stack:
        for path in [out] if out else default_run_folders(prompt):
            try:
                RunFolder(user_path(path, "output folder")).check_unused()  # a run's folder is not touched for its lock
                folder = stack.enter_context(claimed(path))
                folder.check_unused()  # another run may have ended between the two
                break
            except TakenError:
                if out:
                    raise
                stack.close()
        yield folder


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder where there is none; UserError where that fails or no file can be written to it."""
    folder = user_path(path, "output folder")
    _make(folder)
    check_writable(folder)
    return folder


def _make(folder: Path) -> None:
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"output folder {folder} is a file; choose another with --out")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make output folder {folder}: {error.strerror}; choose another with --out") from error


def open_run_folder(path: str | os.PathLike[str], *, writable: bool = True) -> RunFolder:
    """Open the folder of an existing run; UserError where it holds none, or cannot be written to.

    A run is its checkpoint, which has a copy of config.yaml.
    """
    folder = RunFolder(user_path(path, "run folder"))
    if not folder.path.is_dir():
        raise UserError(f"{folder.path} is no folder; give the output folder of an earlier run")
    if not folder.checkpoint.is_file():
        raise UserError(f"{folder.path} holds no {folder.checkpoint.name}; give the output folder of an earlier run")
    if writable:
        check_writable(folder.path)
    return folder


def check_writable(folder: Path) -> None:
    """Raise UserError where no file can be made in `folder`. Tried, since permission bits do not tell it all."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to folder {folder}: {error.strerror}; choose another with --out")


def default_run_folders(prompt: str, parent: str | os.PathLike[str] = "out") -> Iterable[Path]:
    """The folders out/<prompt>, out/<prompt>-2, ... without end, whether or not they are there."""
    slug = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "run"
    return itertools.chain([Path(parent) / slug], (Path(parent) / f"{slug}-{n}" for n in itertools.count(2)))
