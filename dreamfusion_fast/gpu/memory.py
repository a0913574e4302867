"""Memory that a process may still allocate on a GPU, torch's limit to it, and which errors mean that memory ran out."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dreamfusion_fast.errors import joined

# What libraries below torch say, which torch raises as plain RuntimeErrors.
_WORDS = (
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",
)


def limit_fraction(device: torch.device) -> float:
    """Share of the GPU that torch may use in this process; 1 where torch (before 2.9) does not tell."""
    read = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if read is None else float(read(_index(device)))


@contextmanager
def limited(device: torch.device, size: int) -> Iterator[None]:
    """Let torch's allocations on a GPU fail beyond so many bytes in the block; a lower limit stays."""
    before = limit_fraction(device)
    fraction = min(size / torch.cuda.mem_get_info(device)[1], before)
    torch.cuda.set_per_process_memory_fraction(fraction, _index(device))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, _index(device))


def free_bytes(device: torch.device) -> int:
    """Bytes that are free or cached, within torch's limit."""
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    available = free + torch.cuda.memory_reserved(device) - allocated
    return min(available, int(limit_fraction(device) * total) - allocated)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, or is a RuntimeError because of one that does or while it was handled.

    The end of a CUDA graph capture in which memory ran out raises such a RuntimeError. Other kinds of error are not
    looked behind: a UserError has advice of its own, and a TypeError is a bug wherever it is raised.
    """
    return _that_says_so(error) is not None


def what_was_wanted(error: BaseException) -> str:
    """The first sentence or two of what says that memory ran out, which is where torch says how much it wanted."""
    sentences = joined(_that_says_so(error) or error).split(". ")
    wanted = next((sentence for sentence in sentences if "llocate" in sentence), sentences[0])
    return wanted[:100].rstrip(".")


def _that_says_so(error: BaseException) -> BaseException | None:
    """The first error that says that memory ran out, of `error` and those behind it as a traceback shows them."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        if isinstance(link, (torch.OutOfMemoryError, MemoryError)):
            return link
        if isinstance(link, OSError) and link.errno == errno.ENOMEM:  # of a mapping, or of a process to start
            return link
        if not isinstance(link, RuntimeError):
            return None
        if any(words in str(link) for words in _WORDS):
            return link
        seen.add(id(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None


def _index(device: torch.device) -> int:
    """The number of a GPU, which torch wants here: that of plain "cuda" is the current one's."""
    return torch.cuda.current_device() if device.index is None else device.index
