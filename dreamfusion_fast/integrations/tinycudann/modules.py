"""The modules of tiny-cuda-nn's PyTorch bindings."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dreamfusion_fast.integrations.tinycudann.encodings import create_encoding
from dreamfusion_fast.integrations.tinycudann.fused import grid_and_mlp, serves
from dreamfusion_fast.integrations.tinycudann.network import Mlp, padded
from dreamfusion_fast.ops import _native
from dreamfusion_fast.ops._checks import check_number, shown

_warned_of_device = False


def free_temporary_memory() -> None:
    """Collects what Python still holds. Beyond that no memory is kept between calls."""
    gc.collect()


class Module(nn.Module):
    """The base class of the modules below.

    Attributes:
        n_input_dims, n_output_dims: dimensions.
        params: ``[n_params]`` float32, all parameters: of the network's matrices, row by row, then of the encoding. On
            the current GPU if there is one and the native core serves it, as with tiny-cuda-nn.
        loss_scale: 128 with float16 results, else 1; a number to read, which nothing here is multiplied by.
        dtype: of results: float16 on a GPU unless float32 was asked for, float32 on a CPU.
    """

    n_input_dims: int
    n_output_dims: int

    def __init__(self, parts: Mapping[str, Any], seed: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        op = type(self).__name__
        if dtype not in (None, torch.float16, torch.float32):
            raise ValueError(f"{op}: dtype must be None, torch.float16 or torch.float32, got {dtype}")
        check_number(op, "seed", seed, "at least 0", lambda number: number >= 0, whole=True)
        self.seed, self._asked_dtype = seed, dtype
        self._network: Mlp | None = parts.get("network")
        self._encoding = parts["encoding"]
        generator = torch.Generator().manual_seed(seed)
        made = [part.initial(generator) for part in (self._network, self._encoding) if part is not None]
        device = "cuda" if _native.cuda_available() else "cpu"
        self.params = nn.Parameter(torch.cat(made).to(device))

    @property
    def dtype(self) -> torch.dtype:
        """Of results."""
        if self.params.dtype == torch.float64:
            return torch.float64
        return torch.float32 if not self.params.is_cuda else self._asked_dtype or torch.float16

    @property
    def loss_scale(self) -> float:
        """The factor by which tiny-cuda-nn multiplies gradients within its modules."""
        return 128.0 if self.dtype == torch.float16 else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Evaluates the module.

        Args:
            x: ``[n, n_input_dims]``, of any floating type; computed in float32, or float64 if the parameters are.

        Returns:
            ``[n, n_output_dims]`` of `dtype`, differentiable twice to x and the parameters.

        Raises:
            TypeError, ValueError: x of the wrong type or shape.
        """
        op = type(self).__name__
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{op}: x must be a tensor of floats, got {x.dtype if isinstance(x, Tensor) else shown(x)}")
        if x.dim() != 2 or x.shape[1] != self.n_input_dims:
            raise ValueError(f"{op}: x must have shape [n, {self.n_input_dims}], got {list(x.shape)}")
        params, dtype = self.params, self.dtype
        if x.device != params.device:
            _warn_of_device(op, x.device, params.device)
            x = x.to(params.device)
        wide = torch.float64 if params.dtype == torch.float64 else torch.float32
        n_network = 0 if self._network is None else self._network.n_params
        of_network, of_encoding = params.to(wide).split([n_network, self._encoding.n_params])
        half, x = dtype == torch.float16, x.to(wide)
        with torch.autocast(x.device.type, enabled=False):  # the types are those that the module was asked for
            if self._network is None:
                y = self._encoding(x, of_encoding)
            elif half and serves(self._encoding, self._network, x):
                y = self._network.finish(grid_and_mlp(self._encoding, self._network, x, of_encoding, of_network))
            else:
                y = self._network(self._encoding(x, of_encoding), of_network, half)
            return y.to(dtype)

    def extra_repr(self) -> str:
        """Dimensions and settings, in one line."""
        sizes = f"n_input_dims={self.n_input_dims}, n_output_dims={self.n_output_dims}"
        return f"{sizes}, seed={self.seed}, dtype={self.dtype}, n_params={self.params.numel()}"


class Encoding(Module):
    """An encoding of inputs.

    Args:
        n_input_dims: of inputs, which lie in [0, 1].
        encoding_config: a dictionary with "otype": Grid, HashGrid, DenseGrid, TiledGrid, SphericalHarmonics, Frequency,
            OneBlob, Identity or Composite, and the options of that.
        seed: of the first parameters.
        dtype: of results; None: float16 on a GPU.

    Raises:
        TypeError, ValueError: an unknown otype, or an option that is wrong or not served; unknown options warn once.
    """

    def __init__(
        self, n_input_dims: int, encoding_config: Mapping[str, Any], seed: int = 1337, dtype: torch.dtype | None = None
    ) -> None:
        _check_dims("Encoding", n_input_dims=n_input_dims)
        encoding = create_encoding(n_input_dims, encoding_config)
        super().__init__({"encoding": encoding}, seed, dtype)
        self.n_input_dims, self.n_output_dims = n_input_dims, encoding.width
        self.encoding_config = encoding_config


class NetworkWithInputEncoding(Module):
    """An encoding, and an MLP behind it.

    Args:
        n_input_dims: of inputs, which lie in [0, 1].
        n_output_dims: of results.
        encoding_config: as `Encoding`.
        network_config: a dictionary with "otype", FullyFusedMLP or CutlassMLP, "n_neurons", "n_hidden_layers",
            "activation" and "output_activation": None, ReLU, LeakyReLU, Exponential, Sigmoid, Sine, Squareplus,
            Softplus, Tanh or SiLU.
        seed: of the first parameters.
        dtype: of results; None: float16 on a GPU.

    Raises:
        TypeError, ValueError: an unknown otype, or an option that is wrong or not served; unknown options warn once.
    """

    def __init__(
        self,
        n_input_dims: int,
        n_output_dims: int,
        encoding_config: Mapping[str, Any],
        network_config: Mapping[str, Any],
        seed: int = 1337,
        dtype: torch.dtype | None = None,
    ) -> None:
        op = type(self).__name__
        _check_dims(op, n_input_dims=n_input_dims, n_output_dims=n_output_dims)
        encoding = create_encoding(n_input_dims, encoding_config)
        encoding.widen(padded(encoding.width))
        network = Mlp(encoding.width, n_output_dims, network_config)
        super().__init__({"encoding": encoding, "network": network}, seed, dtype)
        self.n_input_dims, self.n_output_dims = n_input_dims, n_output_dims
        self.encoding_config, self.network_config = encoding_config, network_config


class Network(NetworkWithInputEncoding):
    """An MLP. Inputs are filled up with ones to a multiple of 16, so that the first layer may have a bias.

    Args:
        n_input_dims, n_output_dims, network_config, seed, dtype: as `NetworkWithInputEncoding`.

    Raises:
        TypeError, ValueError: an unknown otype, or an option that is wrong or not served; unknown options warn once.
    """

    def __init__(
        self,
        n_input_dims: int,
        n_output_dims: int,
        network_config: Mapping[str, Any],
        seed: int = 1337,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(n_input_dims, n_output_dims, {"otype": "Identity"}, network_config, seed, dtype)


def _check_dims(op: str, **dims: int) -> None:
    for name, value in dims.items():
        check_number(op, name, value, "at least 1", lambda number: number >= 1, whole=True)


def _warn_of_device(op: str, given: torch.device, wanted: torch.device) -> None:
    global _warned_of_device
    if not _warned_of_device:
        _warned_of_device = True
        warnings.warn(f"{op}: x is on {given}, the parameters are on {wanted}: it is copied there", stacklevel=3)
