"""The caller's buffers over samples, as the encodings of a tile take them: checks, and forms for the native core."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import check_tensor
from dreamfusion_fast.ops._native import strided

MAX_SAMPLES = 2**24

ELEMENT_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_NONE = (0, 0, 0, 2)


def check_positions(op: str, positions: Tensor, count: Tensor | None) -> None:
    """Raises TypeError or ValueError unless these are the positions of a tile and the number of its samples."""
    check_tensor(op, "positions", positions, ["n_samples", 3])
    if positions.shape[0] > MAX_SAMPLES:
        raise ValueError(f"{op}: a tile has at most 2^24 samples, got {positions.shape[0]}")
    check_span(op, "positions", positions)
    if count is not None:
        check_tensor(op, "count", count, [1], dtypes=[torch.int32], like=positions)


def table_dtypes(positions: Tensor) -> list[torch.dtype]:
    """The dtypes that a table may have: on a GPU, float16 serves float32 positions, too."""
    narrow = on_gpu(positions) and positions.dtype == torch.float32
    return [torch.float16, torch.float32] if narrow else [positions.dtype]


def check_table_layout(op: str, name: str, table: Tensor) -> None:
    """Raises ValueError unless a table, or its gradient, lies as kernels want it."""
    if not table.is_contiguous() or (on_gpu(table) and table.data_ptr() % 16):
        raise ValueError(f"{op}: {name} must be contiguous and aligned to 16 bytes")


def check_channels(op: str, name: str, tensor: Tensor, positions: Tensor, channels: int, wanted: str) -> None:
    """Raises TypeError or ValueError unless it has a row of so many channels for each position, or longer ones."""
    narrow = on_gpu(positions) and positions.dtype == torch.float32
    dtypes = [torch.float16, torch.bfloat16, torch.float32] if narrow else [positions.dtype]
    check_tensor(op, name, tensor, [positions.shape[0], wanted], dtypes=dtypes, like=positions)
    if tensor.shape[1] < channels:
        raise ValueError(f"{op}: {name} must have at least {channels} channels, got {tensor.shape[1]}")
    check_span(op, name, tensor)


def check_vectors(op: str, name: str, tensor: Tensor, positions: Tensor) -> None:
    """Raises TypeError or ValueError unless it has a vector for each position, of its dtype."""
    check_tensor(op, name, tensor, positions.shape, like=positions, same_dtype=True)
    check_span(op, name, tensor)


def check_span(op: str, name: str, tensor: Tensor) -> None:
    """Raises ValueError for a view that is too long: kernels count elements in 32 bits."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() > 0 and last >= 2**32:
        raise ValueError(f"{op}: {name} must span at most 2^32 elements, got strides {tensor.stride()}")


def array(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """A buffer as a kernel takes it: address, strides, type."""
    if tensor is None:
        return _NONE
    return *strided(tensor), ELEMENT_TYPES[tensor.dtype]


def on_gpu(tensor: Tensor) -> bool:
    """Whether kernels take it, or the CPU's functions for packed arrays."""
    return tensor.device.type == "cuda"


def live(positions: Tensor, count: Tensor | None) -> int:
    """How many samples there are, on a CPU."""
    n = positions.shape[0]
    return n if count is None else min(max(int(count), 0), n)


def rows(tensor: Tensor, n: int, channels: int) -> Tensor:
    """Its first samples and channels, contiguous, as the CPU's functions want them; the tensor itself where it is."""
    return tensor[:n, :channels].contiguous()


def write_back(out: Tensor, tensor: Tensor) -> None:
    """Copies what was written for `tensor`, unless `rows` gave out its own memory."""
    if out.data_ptr() != tensor.data_ptr():
        tensor[: out.shape[0], : out.shape[1]] = out
