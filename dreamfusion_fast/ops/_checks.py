"""Argument checks shared by the ops: each error names the argument, what was given and what is wanted."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
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
        TypeError: no tensor, one that is not dense, or another dtype.
        ValueError: another shape or device.
    """
    where = f"{op}: {name}"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where} must be a torch.Tensor, got {shown(tensor)}")
    # Of others there is no one address with strides, which is all that the native core knows of a tensor.
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{where} must be a dense tensor, got {'a nested one' if tensor.is_nested else tensor.layout}")
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


def check_number(
    op: str, name: str, value: Any, wanted: str, fits: Callable[[Any], bool] = lambda _: True, whole: bool = False
) -> None:
    """Checks an argument that is a number, of Python or NumPy.

    Args:
        op, name: of the op and of the argument, for the message.
        value: the argument.
        wanted: what follows "must be", for the message.
        fits: whether a number will do; one that overflows there will not.
        whole: whether it has to be an integer.

    Raises:
        TypeError: no number, or not a whole one.
        ValueError: one that does not fit.
    """
    kinds = (numbers.Integral, torch.SymInt) if whole else (numbers.Real, torch.SymInt, torch.SymFloat)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{op}: {name} must be {wanted}{' (an integer)' if whole else ''}, got {shown(value)}")
    try:
        fitting = fits(value)
    except OverflowError:
        fitting = False
    if not fitting:
        raise ValueError(f"{op}: {name} must be {wanted}, got {shown(value)}")


def positive_in(dtype: torch.dtype) -> Callable[[Any], bool]:
    """For `check_number`: above 0 and finite also when it has become this type."""
    return lambda number: torch.finfo(dtype).tiny <= number <= torch.finfo(dtype).max


def check_flag(op: str, name: str, value: Any) -> None:
    """Raises TypeError unless it is a bool, of Python or NumPy, or 0 or 1."""
    if not isinstance(value, (bool, torch.SymBool, np.bool_)) and not (isinstance(value, int) and value in (0, 1)):
        raise TypeError(f"{op}: {name} must be True or False, got {shown(value)}")


def as_list(op: str, name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """The list that an op takes. Raises TypeError where it is none; `check_tensor` looks at its elements."""
    if not isinstance(tensors, Iterable) or isinstance(tensors, (str, bytes, Tensor)):
        raise TypeError(f"{op}: {name} must be a list of tensors, got {shown(tensors)}")
    return list(tensors)


def shown(value: Any) -> str:
    """An argument in a message: numbers and text as they are, of what would be long or several lines the type."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    short = isinstance(value, (numbers.Number, str, type(None))) and len(repr(value)) <= 60
    return repr(value) if short else type(value).__name__


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
