"""Which errors mean that memory ran out."""

from __future__ import annotations

import torch

from dreamfusion_fast.errors import UserError

# What libraries below torch say, which torch raises as plain RuntimeErrors.
_WORDS = (
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)


class DoesNotFitError(UserError):
    """A step does not fit into memory, with everything saved that can be. The run is as it was before the step."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def what_was_wanted(error: BaseException) -> str:
    """The first sentence or two of an error, which is where torch says how much it wanted."""
    sentences = " ".join(str(error).split()).split(". ")
    wanted = next((sentence for sentence in sentences if "llocate" in sentence), sentences[0])
    return wanted[:100].rstrip(".")
