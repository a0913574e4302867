"""Random draws of materials and geometries that see a render in chunks, and each chunk twice."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class RepeatedDraws:
    """The random numbers that are drawn in the calls of one render.

    Draws from `random` and NumPy are the same in all of its calls, since they choose something for the whole image: how
    it is shaded, a strength of light. Those of torch are of each chunk its own, as noise is, and the same again when
    the chunk is recomputed. Afterwards each generator is where one call would have left it, but torch's, which goes on
    from chunk to chunk; a call in backward leaves no trace.
    """

    def __init__(self) -> None:
        self._whole: Any = None
        self._chunks: dict[int, Any] = {}

    @contextmanager
    def of(self, chunk: int, device: torch.device) -> Iterator[None]:
        """While a chunk, named by its first ray, is computed."""
        whole, own = _numbers(), _tensors(device)
        first_call = self._whole is None
        if first_call:
            self._whole = whole
        else:
            _restore(self._whole)
        again = chunk in self._chunks
        if again:
            _restore(self._chunks[chunk])
        else:
            self._chunks[chunk] = own
        try:
            yield
        finally:
            if not first_call:
                _restore(whole)
            if again:
                _restore(own)


_State = list[tuple[Callable[[Any], None], Any]]


def _numbers() -> _State:
    return [(random.setstate, random.getstate()), (np.random.set_state, np.random.get_state())]


def _tensors(device: torch.device) -> _State:
    states: _State = [(torch.set_rng_state, torch.get_rng_state())]
    if device.type == "cuda":
        states.append((lambda state: torch.cuda.set_rng_state(state, device), torch.cuda.get_rng_state(device)))
    return states


def _restore(states: _State) -> None:
    for restore, state in states:
        restore(state)
