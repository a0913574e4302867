"""Files of a pipeline's folders: what their names promise, and hashes of what is in them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_READ_AT_ONCE = 2**20
TOKENIZER_FILES = "tokenizer.json, vocab.json with merges.txt, vocab.txt, or a sentencepiece *.model"


def is_pickle(name: str) -> bool:
    """Whether a file of this name holds weights as a pickle."""
    return name.endswith(_PICKLES)


def holds_tokenizer(names: Sequence[str]) -> bool:
    """Whether files of these names are a tokenizer's vocabulary: `TOKENIZER_FILES`."""
    return (
        "tokenizer.json" in names
        or ("vocab.json" in names and "merges.txt" in names)
        or "vocab.txt" in names
        or any(name.endswith(".model") for name in names)
    )


def content_hash(path: Path) -> str:
    """sha256 of a whole file. A file is read once per process, and again when its size or a time of change differs."""
    status = path.stat()
    # The time of change of the inode, too: the other one can be set, and is by tools that copy.
    state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return _content_hash(path.resolve(), state)


@functools.cache
def _content_hash(path: Path, state: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_AT_ONCE))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()
