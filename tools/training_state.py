"""A training that can be cut anywhere: its state as a few files, each small enough to be carried."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import torch

from dreamfusion_fast.io import write_bytes

PART_BYTES = 15_500_000
_NAME = re.compile(r"state-(\d+)-(\d+)-of-(\d+)\.part")
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(folder: Path, state: dict[str, Any], number: int, part_bytes: int = PART_BYTES) -> None:
    """Write a state as `state-NUMBER-I-of-N.part` of at most `part_bytes` each, then remove older ones."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    pieces = [content[i : i + part_bytes] for i in range(0, len(content), part_bytes)]
    folder.mkdir(parents=True, exist_ok=True)
    written = set()
    for index, piece in enumerate(pieces):
        path = folder / f"state-{number}-{index}-of-{len(pieces)}.part"
        write_bytes(path, piece)
        written.add(path.name)
    for path in folder.glob("state-*.part"):
        if path.name not in written:
            path.unlink()


def load_state(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """The newest state of which every part is there; None where there is no part at all.

    Raises:
        ValueError: there are parts, but no complete set of them.
    """
    sets: dict[tuple[int, int], dict[int, Path]] = {}
    for path in folder.glob("state-*.part"):
        match = _NAME.fullmatch(path.name)
        if match:
            number, index, count = map(int, match.groups())
            sets.setdefault((number, count), {})[index] = path
    if not sets:
        return None
    for (_, count), found in sorted(sets.items(), reverse=True):
        if set(found) == set(range(count)):
            content = b"".join(found[i].read_bytes() for i in range(count))
            return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    (number, count), found = max(sets.items())
    missing = sorted(set(range(count)) - set(found))
    raise ValueError(f"out: {folder} holds part of state {number} only, missing {missing} of {count} parts")


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state with both moments as bfloat16, a quarter of the file saved.

    The optimiser itself is rounded alike, so that a run that goes on and a run that is resumed do the same.
    """
    with torch.no_grad():
        for values in optimizer.state.values():
            for name in _MOMENTS:
                values[name].copy_(values[name].bfloat16())
    whole = optimizer.state_dict()
    half = {
        index: {name: value.bfloat16() if name in _MOMENTS else value for name, value in values.items()}
        for index, values in whole["state"].items()
    }
    return whole | {"state": half}
