"""Argument checks shared by the ops: each error names the argument, what was given and what is wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype] = FLOATS,
    like: Tensor | None = None,
    same_dtype: bool = False,
) -> None:
    """Checks one tensor argument.

    Args:
        op: name of the op, for the message.
        name: name of the argument, for the message.
        tensor: the argument.
        shape: wanted sizes; a string stands for any size and names it in the message, as in ``["n_rays", 3]``.
        dtypes: allowed dtypes.
        like: a tensor that was checked before and whose device this one must share.
        same_dtype: whether it must share the dtype of `like`, too.

    Raises:
        TypeError: no tensor, or another dtype.
        ValueError: another shape or device.
    """
    where = f"{op}: {name}"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where} must be a torch.Tensor, got {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted_shape = ", ".join(str(size) for size in shape)
        raise ValueError(f"{where} must have shape [{wanted_shape}], got {list(tensor.shape)}")
    allowed = [like.dtype] if same_dtype and like is not None else list(dtypes)
    if tensor.dtype not in allowed:
        raise TypeError(f"{where} must be {' or '.join(str(dtype) for dtype in allowed)}, got {tensor.dtype}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{where} is on {tensor.device}, the other arguments are on {like.device}")


def check_same_length(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises ValueError unless both have as many rows."""
    if tensor.shape[0] != other.shape[0]:
        raise ValueError(f"{op}: {name} has {tensor.shape[0]} rows, {other_name} has {other.shape[0]}")


def check_transforms(op: str, *tensors: Tensor, vmap: bool = True) -> None:
    """Raises RuntimeError where torch.func differentiates one of the tensors: the native ops' gradients are autograd's.

    The twins are plain PyTorch, and take part.

    Args:
        op: name of the op, which is that of its twin without "_reference".
        tensors: its differentiable arguments.
        vmap: whether torch.vmap can run the op in a loop; it cannot if the op takes lists.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    functorch = torch._C._functorch
    for tensor in tensors:
        while functorch.is_functorch_wrapped_tensor(tensor):
            differentiated = functorch.is_gradtrackingtensor(tensor)
            if differentiated or not vmap:
                transform = "torch.func.grad, vjp, jvp and the like do" if differentiated else "torch.vmap does"
                raise RuntimeError(
                    f"{op}: {transform} not go through the native op: use torch.autograd, one "
                    f"batch, or the twin, {op}_reference"
                )
            tensor = functorch.get_unwrapped(tensor)
