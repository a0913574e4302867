"""Names for the parts of a training step, so that a profiler can tell them apart.

Code that has a part worth naming writes ``with stage("unet"):``. While nobody records, that is a context that does
nothing (well below a microsecond). Who records decides what a stage is: `dreamfusion_fast.training.profile` measures
its time and memory.

Stages may be nested, and may repeat within a step: the recorder is told when each begins and ends. They mean nothing
for what is computed, so they may stand anywhere: under no_grad, in a backward, around or inside a CUDA graph's capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Recorder = Callable[[str], AbstractContextManager[None]]
"""Who is told of stages: gives for a name the context that stands for one stage."""

_NOTHING: AbstractContextManager[None] = nullcontext()
_recorder: Recorder | None = None


def stage(name: str) -> AbstractContextManager[None]:
    """A context that tells the recorder, if there is one, that the stage `name` goes on within it."""
    return _NOTHING if _recorder is None else _recorder(name)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Within it, `recorder` is told of every stage of this process, in place of the one that was told before."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before
