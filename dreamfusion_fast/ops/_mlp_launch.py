"""Launches of the fused MLP's kernels, and every constant by which they can be tuned."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dreamfusion_fast.ops._mlp_torch import Network
from dreamfusion_fast.ops._triton import triton_serves

WIDTHS = (16, 32, 64, 128)
MAX_WIDTH_FLOAT32 = 64
MAX_HIDDEN_LAYERS = 4
MAX_INPUTS = 128
MAX_OUTPUTS = 16
MAX_ROWS = 2**30
"""Row numbers are 32-bit, and a program steps beyond the last row before it stops."""


class Tuning(NamedTuple):
    """How one kernel is launched."""

    block: int
    """Rows a program takes at a time."""
    warps: int
    programs: int
    """Programs per multiprocessor that loop over the blocks."""
    max_registers: int | None = None
    """Registers per thread, where the compiler would take so many that fewer programs fit."""


# Chosen from what the compiler says of registers, spills and shared memory for sm_80 and sm_90, and where it says so,
# measured: 2^19 rows of the default network in float16 on an H100, in microseconds without and with the input gradient.
FORWARD = Tuning(block=128, warps=8, programs=3, max_registers=128)
"""97 and 89; with 2 programs 139 and 137, with blocks of 64 and 4 warps 140 and 116."""
FORWARD_WIDE = Tuning(block=64, warps=8, programs=1)
"""Width 128."""
FORWARD_FLOAT32 = Tuning(block=32, warps=8, programs=3)
BACKWARD = Tuning(block=64, warps=4, programs=2)
"""142 and 253; blocks of 128 with 8 warps and 1 program 161 and 288, with 4 warps 379 and 605."""
BACKWARD_WIDE = Tuning(block=64, warps=8, programs=1)
BACKWARD_FLOAT32 = Tuning(block=16, warps=8, programs=2, max_registers=128)

MAX_SUMS = 8192
"""Weights whose gradients one launch sums up in registers: 32 per thread, of which the default network uses 28."""
SPLIT_SECOND_ORDER = True
"""Sum up what the gradient of v adds in a launch of its own. Both in one need more registers than there are."""
RESIDENT_BYTES = 32768
"""Weights that may stay in shared memory, of which activations need twice as much and some GPUs have 99 KB."""

INTERPRETED_PROGRAMS = 3
"""Programs on the CPU, where the interpreter runs one after the other: more than one, so that tests see the loop."""


def kernels_serve(device: torch.device, weights: Sequence[Tensor], precision: str | None = None) -> bool:
    """Whether the kernels compute a network of this size and type on this device, in some or in the given precision.

    In float32 there are no tensor cores to use, and products of width 128 neither fit into registers nor compile in
    less than a minute.
    """
    return _fit(weights[0].dtype, tuple(weight.shape for weight in weights), precision) and triton_serves(device)


@functools.cache
def _fit(dtype: torch.dtype, shapes: tuple[torch.Size, ...], precision: str | None) -> bool:
    width = shapes[0][0]
    return (
        dtype == torch.float32
        and width in WIDTHS
        and not (precision == "float32" and width > MAX_WIDTH_FLOAT32)
        and all(shape[0] == width for shape in shapes[:-1])
        and 2 <= len(shapes) <= MAX_HIDDEN_LAYERS + 1
        and shapes[0][1] <= MAX_INPUTS
        and shapes[-1][0] <= MAX_OUTPUTS
    )


def backward_programs(device: torch.device, weights: Sequence[Tensor]) -> int:
    """The most programs that sum up gradients on a device, whatever the precision."""
    networks = [Network(weights, None, "relu", precision) for precision in ("float32", "float16")]
    return max(_programs(device, tuning("backward", network).programs) for network in networks)


def tuning(kernel: str, network: Network) -> Tuning:
    """How ``"forward"`` or ``"backward"`` is launched for a network."""
    if network.precision == "float32":
        return FORWARD_FLOAT32 if kernel == "forward" else BACKWARD_FLOAT32
    if network.weights[0].shape[0] > 64:
        return FORWARD_WIDE if kernel == "forward" else BACKWARD_WIDE
    return FORWARD if kernel == "forward" else BACKWARD


def prepare_forward(x: Tensor, network: Network, y: Tensor, v: Tensor | None, counted: bool = True) -> Prepared:
    """The launch that writes y and, unless it is None, v, with all but the count given.

    With a v, x is of the operands' type: Triton 3.6 fails to compile a v that is stored in another.
    """
    n = x.shape[0]
    if n == 0:
        return Prepared(x.device, [])
    launch = tuning("forward", network)
    grid = min(_programs(x.device, launch.programs), -(-n // launch.block))
    arguments = (
        *(x, *x.stride(), y, *y.stride(), *_with_strides(v)),
        *(*_padded(network.weights), *_padded(network.biases), n),
    )
    settings = _settings("forward", network, counted, launch)
    kernel = _kernels().forward_kernel
    return Prepared(x.device, [_Launch(kernel, grid, arguments, {**settings, "INPUT_GRADIENT": v is not None})])


def prepare_backward(
    x: Tensor,
    network: Network,
    grad_y: Tensor,
    u: Tensor | None,
    grad_x: Tensor | None,
    partials: Tensor | None,
    counted: bool = True,
) -> Prepared:
    """The launches that write grad_x and add to `partials` ``[programs, parameters]``; each may be None."""
    n = x.shape[0]
    if n == 0:
        return Prepared(x.device, [])
    launch = tuning("backward", network)
    programs = _programs(x.device, launch.programs)
    grid = min(programs if partials is None else min(programs, partials.shape[0]), -(-n // launch.block))
    parameters = (*_padded(network.weights), *_padded(network.biases)[:-1])
    settings = _settings("backward", network, counted, launch)
    smooth = network.activation != "relu"
    sizes = tuple(weight.numel() for weight in network.weights) if partials is not None else ()
    launches = []
    for gradients, second_sums, to_x in _plan(sizes, u is not None, grad_x is not None):
        # A launch that sums up only what u adds does not read grad_y; ReLUs pass nothing of u on to x.
        used_u = u if u is not None and (second_sums or smooth) else None
        arguments = (
            *(x, *x.stride(), grad_y, *grad_y.stride(), *_with_strides(used_u)),
            *_with_strides(grad_x if to_x else None),
            *parameters,
            *(partials, 0 if partials is None else partials.stride(0), n),
        )
        choices = {"SECOND": used_u is not None, "SECOND_SUMS": second_sums, "GRAD_X": to_x, "GRADIENTS": gradients}
        launches.append(_Launch(_kernels().backward_kernel, grid, arguments, {**settings, **choices}))
    return Prepared(x.device, launches)


class Prepared:
    """Launches that are made again and again with another count of rows."""

    def __init__(self, device: torch.device, launches: list[_Launch]) -> None:
        self._device, self._launches = device, launches

    def __call__(self, count: Tensor | None) -> None:
        """Launch for the first ``min(n, count)`` rows; None where it was prepared for all of them."""
        if self._device.type != "cuda" or torch.cuda.current_device() == self._device.index:
            for launch in self._launches:
                launch(count)
            return
        with torch.cuda.device(self._device):
            for launch in self._launches:
                launch(count)


# Compiled kernels by what they were compiled for, each with its constants in the order of its parameters.
_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


class _Launch:
    """One launch: what `kernel[grid](*arguments, count, **settings)` does, and less of it once that has been done.

    Triton goes through all arguments at each launch to find out for what it has to compile; a renderer launches one
    kernel for tile after tile. Only where all addresses are aligned alike is one compiled kernel right for all.
    """

    def __init__(self, kernel: Any, grid: int, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        self._kernel, self._grid, self._arguments, self._settings = kernel, (grid, 1, 1), arguments, settings
        addresses = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
        aligned = all(
            address % 16 == 0 for address, x in zip(addresses, arguments, strict=True) if isinstance(x, Tensor)
        )
        described = [(x.dtype, x.device) if isinstance(x, Tensor) else x for x in arguments]
        self._key = (kernel, *described, *settings.values()) if aligned else None
        self._raw = addresses
        self._known = _compiled.get(self._key) if self._key is not None else None

    def __call__(self, count: Tensor | None) -> None:
        address = None if count is None else count.data_ptr()
        aligned = address is None or address % 16 == 0
        if self._known is not None and aligned:
            compiled, constants = self._known
            compiled[self._grid](*self._raw, address, *constants)
            return
        compiled = self._kernel[self._grid](*self._arguments, count, **self._settings)
        if compiled is not None and self._key is not None and aligned:  # the interpreter compiles nothing
            names = [name for name in self._kernel.arg_names if name in self._settings]
            self._known = _compiled[self._key] = (compiled, [self._settings[name] for name in names])


@functools.cache
def _plan(sizes: tuple[int, ...], second: bool, to_x: bool) -> list[tuple[int, int, bool]]:
    """The launches of a backward pass: which layers' gradients each sums up, those of what u adds, and whether to x.

    Args:
        sizes: weights of each layer; none if no gradients are wanted.
        second: whether there is a gradient u of v.
        to_x: whether grad_x is wanted.
    """
    groups: list[tuple[int, int]] = []  # the layers' bits, and their weights
    for layer, size in enumerate(sizes):
        bit = _kernels().LAST_LAYER.value if layer == len(sizes) - 1 else 1 << layer
        if groups and groups[-1][1] + size <= MAX_SUMS:
            groups[-1] = (groups[-1][0] | bit, groups[-1][1] + size)
        else:
            groups.append((bit, size))
    masks = [mask for mask, _ in groups]
    if not second or not SPLIT_SECOND_ORDER:
        launches = [(mask, mask if second else 0) for mask in masks]
    else:
        launches = [(mask, 0) for mask in masks] + [(0, mask) for mask in masks]
    if not launches and to_x:
        launches = [(0, 0)]
    return [(*launch, to_x and i == 0) for i, launch in enumerate(launches)]


def _settings(kernel: str, network: Network, counted: bool, launch: Tuning) -> dict[str, Any]:
    """The compile-time constants of a kernel that do not depend on what is wanted of it, and how it is compiled."""
    width, inputs = network.weights[0].shape
    language = _kernels().tl
    gradient = {"GRADIENT": language.float32 if network.precision == "float32" else language.bfloat16}
    # In 16 bits, backward has the weights in two types.
    bytes_per_weight = 2 if kernel == "forward" and network.precision != "float32" else 4
    return {
        **(gradient if kernel == "backward" else {}),
        "D_IN": inputs,
        "COLS": max(16, 1 << (inputs - 1).bit_length()),
        "WIDTH": width,
        "LAYERS": len(network.weights) - 1,
        "D_OUT": network.weights[-1].shape[0],
        "ACTIVATION": network.activation,
        "BIAS": network.biases is not None,
        "COUNT": counted,
        "OPERAND": getattr(language, network.precision),
        "RESIDENT": bytes_per_weight * sum(weight.numel() for weight in network.weights) <= RESIDENT_BYTES,
        "BLOCK": launch.block,
        "num_warps": launch.warps,
        # No pipelining: it would hold several copies of the weights that are loaded in the loop.
        "num_stages": 1,
        "maxnreg": launch.max_registers,
        # What Triton does by default today, and is about to change: fuse a product and a sum into one rounding.
        "enable_fp_fusion": True,
    }


def _padded(tensors: Sequence[Tensor] | None) -> list[Tensor | None]:
    """Contiguous tensors of all layers, with None before the last for the hidden layers that this network lacks."""
    if not tensors:
        return [None] * (MAX_HIDDEN_LAYERS + 1)
    contiguous = [tensor.detach().contiguous() for tensor in tensors]
    return [*contiguous[:-1], *[None] * (MAX_HIDDEN_LAYERS + 1 - len(tensors)), contiguous[-1]]


def _with_strides(tensor: Tensor | None) -> tuple[Any, ...]:
    return (None, None, None) if tensor is None else (tensor, *tensor.stride())


def _programs(device: torch.device, per_multiprocessor: int) -> int:
    if device.type == "cpu":
        return INTERPRETED_PROGRAMS
    return per_multiprocessor * _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _kernels() -> ModuleType:
    """The kernels, which import triton: only where they are launched."""
    from dreamfusion_fast.ops import _mlp_triton

    return _mlp_triton
