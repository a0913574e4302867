"""What a process may still allocate on a GPU, and torch's limit to it."""

from __future__ import annotations

import torch


def limit_fraction(device: torch.device) -> float:
    """Share of the GPU that torch may use in this process; 1 where torch (before 2.9) does not tell."""
    read = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if read is None else float(read(_index(device)))


def set_limit_fraction(device: torch.device, fraction: float) -> None:
    """Let torch's allocations fail beyond this share of the GPU."""
    torch.cuda.set_per_process_memory_fraction(fraction, _index(device))


def free_bytes(device: torch.device) -> int:
    """Bytes that are free or cached, within torch's limit."""
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    available = free + torch.cuda.memory_reserved(device) - allocated
    return min(available, int(limit_fraction(device) * total) - allocated)


def _index(device: torch.device) -> int:
    """The number of a GPU, which torch wants here: that of plain "cuda" is the current one's."""
    return torch.cuda.current_device() if device.index is None else device.index
