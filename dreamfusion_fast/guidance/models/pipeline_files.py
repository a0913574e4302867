"""Files of a pipeline's folders: which are read, JSON within limits, hashes of contents, and a folder for a library.

A pipeline is a stranger's. The libraries that load its parts look for many more files than a part needs, and some of
these name others to be read or run. So they never see the pipeline's folder, but one with the chosen files alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from dreamfusion_fast.errors import one_line
from dreamfusion_fast.io import safetensors_from_bytes

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_TOKENIZER_DATA = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
# By library: of safetensors, and of pickles.
_WEIGHTS = {
    "diffusers": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "transformers": ("model.safetensors", "pytorch_model.bin"),
}
# Bytes, levels, digits: far more than any published model's.
_LARGEST_JSON, _DEEPEST_JSON, _LONGEST_INTEGER = 2**24, 32, 40
_READ_AT_ONCE = 2**20
# Bytes of a LoRA or of an embedding.
_LARGEST_ADDITION = 2**32
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


def weights_file(names: Sequence[str], library: str, variant: str | None, pickled: bool) -> tuple[str, str] | None:
    """The file of a model's weights, or the index of several, and its name without the variant; None: not there."""
    usual = _WEIGHTS[library][pickled]
    stem, _, ending = usual.rpartition(".")
    index = f"{usual}.index.json"
    if variant is None:
        choices = {usual: usual, index: index}
    else:  # libraries put the variant into the name of an index in several places
        choices = {f"{stem}.{variant}.{ending}": usual, f"{usual}.index.{variant}.json": index}
        choices |= dict.fromkeys((f"{stem}.{variant}.{ending}.index.json", f"{usual}.{variant}.index.json"), index)
    return next(((name, plain) for name, plain in choices.items() if name in names), None)


def tokenizer_files(names: Sequence[str]) -> list[str]:
    """Those of these names that are a tokenizer's data; `TOKENIZER_SETTINGS` are not."""
    return [name for name in names if name in _TOKENIZER_DATA or name.endswith(".model")]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: no JSON, no object, or one that is too large or too deep.
    """
    with path.open("rb") as file:
        return parse_json(file.read(_LARGEST_JSON + 1))


def parse_json(data: bytes) -> dict[str, Any]:
    """The same of the contents of a file; raises ValueError as `read_json` does."""
    if len(data) > _LARGEST_JSON:
        raise ValueError(f"more than {_LARGEST_JSON >> 20} MiB")
    try:
        content = json.loads(data.decode("utf-8"), parse_int=_integer)
    except RecursionError:
        raise ValueError(f"more than {_DEEPEST_JSON} levels deep") from None
    if not isinstance(content, dict):
        raise ValueError("it does not hold a JSON object")
    level: list[Any] = [content]
    for _ in range(_DEEPEST_JSON):
        below = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in below for value in values if isinstance(value, (dict, list))]
    if level:
        raise ValueError(f"more than {_DEEPEST_JSON} levels deep")
    return content


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """The tensors of a safetensors file, on the CPU, sorted by name, its metadata, and sha256 of the same bytes.

    For files that are small beside a model.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no safetensors file, is too large, or holds something else than real numbers.
    """
    from safetensors import SafetensorError

    if is_pickle(path.name):
        raise ValueError("it is a pickle, which can run code on loading: convert it to safetensors")
    if not path.is_file():
        raise ValueError("it is no file" if path.exists() else "there is no such file")
    with path.open("rb") as file:
        data = file.read(_LARGEST_ADDITION + 1)
    if len(data) > _LARGEST_ADDITION:
        raise ValueError(f"it has more than {_LARGEST_ADDITION >> 30} GiB")
    try:
        tensors, metadata = safetensors_from_bytes(data)
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"it is no safetensors file ({one_line(error, 200)})") from error
    for name, value in tensors.items():
        if not value.is_floating_point() or value.dtype.itemsize < 2:
            raise ValueError(f"{one_line(name, 80)} is of {value.dtype}, want real numbers of 16 bits or more")
    return tensors, metadata, hashlib.sha256(data).hexdigest()


@contextmanager
def staged(files: Mapping[str, Path | dict[str, Any]]) -> Iterator[Path]:
    """A temporary folder that holds these files and no others: links to them, or JSON that is written."""
    with tempfile.TemporaryDirectory(prefix="dreamfusion-fast-") as folder:
        for name, content in files.items():
            if isinstance(content, Path):
                (Path(folder) / name).symlink_to(content.resolve())
            else:
                (Path(folder) / name).write_text(json.dumps(content), encoding="utf-8")
        yield Path(folder)
