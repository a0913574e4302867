"""tiny-cuda-nn's encodings: what they are configured by, how many parameters they have, and what they compute.

An encoding is a function of inputs ``[n, n_input]`` in [0, 1] and of its share of the parameters. Where a network is
behind it, it is made wider, to a multiple of 16, with constants that each encoding places in its own way.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dreamfusion_fast.fields.spherical_harmonics import MOST_BANDS, spherical_harmonics
from dreamfusion_fast.integrations.tinycudann.config import Options
from dreamfusion_fast.integrations.tinycudann.grid import GridLevels, encode_grid, initial_table
from dreamfusion_fast.ops._checks import shown


class InputEncoding(ABC):
    """One encoding.

    Attributes:
        n_input, n_output: dimensions, the latter without what makes it wider.
        width: dimensions of the result.
        n_params: floats.
        multiple: what its place among others has to be a multiple of.
    """

    multiple = 1

    def __init__(self, n_input: int, n_output: int, n_params: int = 0) -> None:
        self.n_input, self.n_output, self.n_params = n_input, n_output, n_params
        self.width = n_output

    @abstractmethod
    def encode(self, x: Tensor, params: Tensor) -> Tensor:
        """``[n, n_output]`` of x ``[n, n_input]`` and params ``[n_params]``, of one floating type; differentiable."""

    def initial(self, generator: Generator) -> Tensor:
        """The first parameters, ``[n_params]`` float32."""
        return torch.empty(0)

    def widen(self, width: int) -> None:
        """Makes the result at least as wide as it was."""
        self.width = width

    def padded(self, encoded: Tensor) -> Tensor:
        """``[n, width]``: with ones behind."""
        return F.pad(encoded, (0, self.width - self.n_output), value=1.0)

    def __call__(self, x: Tensor, params: Tensor) -> Tensor:
        """``[n, width]``, as `encode`."""
        encoded = self.encode(x, params)
        return encoded if self.width == self.n_output else self.padded(encoded)


class Identity(InputEncoding):
    """x scale + offset."""

    def __init__(self, n_input: int, options: Options) -> None:
        super().__init__(n_input, n_input)
        self.scale = options.number("scale", 1.0, "a number", lambda _: True, whole=False)
        self.offset = options.number("offset", 0.0, "a number", lambda _: True, whole=False)

    def encode(self, x: Tensor, params: Tensor) -> Tensor:
        return x * self.scale + self.offset


class Frequency(InputEncoding):
    """sin(2^k pi x), cos(2^k pi x), for k = 0, ..., n_frequencies - 1, input after input (Mildenhall et al. 2020)."""

    def __init__(self, n_input: int, options: Options) -> None:
        self.n = options.number("n_frequencies", 12, "between 1 and 64", lambda n: 1 <= n <= 64)
        super().__init__(n_input, 2 * self.n * n_input)

    def encode(self, x: Tensor, params: Tensor) -> Tensor:
        frequencies = math.pi * 2.0 ** torch.arange(self.n, dtype=x.dtype, device=x.device)
        angles = x.unsqueeze(2) * frequencies
        return torch.stack([angles.sin(), angles.cos()], 3).flatten(1)


class OneBlob(InputEncoding):
    """How much of a kernel around x lies in each of n_bins bins; what leaves [0, 1] enters at its other end.

    Müller et al. 2019, "Neural Importance Sampling", with the quartic kernel 15/16 (1 - u^2)^2, u = n_bins (y - x),
    in place of a Gaussian, as in tiny-cuda-nn.
    """

    def __init__(self, n_input: int, options: Options) -> None:
        wanted = "a power of two of at most 1024"
        self.n = options.number("n_bins", 16, wanted, lambda n: 1 <= n <= 1024 and n & (n - 1) == 0)
        super().__init__(n_input, self.n * n_input)

    def encode(self, x: Tensor, params: Tensor) -> Tensor:
        edges = torch.arange(self.n + 1, dtype=x.dtype, device=x.device) / self.n
        distance = edges - x.unsqueeze(2)
        below = sum(self._integral(distance + turn) for turn in (-1.0, 0.0, 1.0))
        assert isinstance(below, Tensor)
        return below.diff(dim=2).flatten(1)

    def _integral(self, distance: Tensor) -> Tensor:
        """Of the kernel up to a distance: 0 and 1 beyond its ends, where it is flat to the second order."""
        u = (distance * self.n).clamp(-1, 1)
        return 15 / 16 * u * (1 - 2 / 3 * u**2 + u**4 / 5) + 0.5


class SphericalHarmonics(InputEncoding):
    """The real spherical harmonics of degrees below `degree`, of 2 x - 1, as polynomials of its coordinates.

    By the recurrences of Sloan 2008, "Stupid Spherical Harmonics Tricks", appendix A1. Degree l and order m have index
    l^2 + l + m and the sign (-1)^m. The direction need not have length 1: polynomials in z are not made homogeneous.
    """

    def __init__(self, n_input: int, options: Options) -> None:
        if n_input != 3:
            raise ValueError(f"{options.where}: takes 3 inputs, got {n_input}")
        self.degree = options.number("degree", 4, "between 1 and 8", lambda n: 1 <= n <= 8)
        super().__init__(n_input, self.degree**2)

    def encode(self, x: Tensor, params: Tensor) -> Tensor:
        if self.degree <= MOST_BANDS:  # the same, written out
            return spherical_harmonics(2 * x - 1, self.degree)
        along, across, z = (2 * x - 1).unbind(1)
        found: dict[tuple[int, int], Tensor] = {}
        cosine, sine = torch.ones_like(z), torch.zeros_like(z)  # of m times the azimuth, times sin(polar)^m
        for m in range(self.degree):
            previous, legendre = torch.zeros_like(z), torch.full_like(z, _double_factorial(2 * m - 1) * (-1.0) ** m)
            for degree in range(m, self.degree):
                if degree > m:
                    following = ((2 * degree - 1) * z * legendre - (degree + m - 1) * previous) / (degree - m)
                    previous, legendre = legendre, following
                ratio = math.factorial(degree - m) / math.factorial(degree + m)
                norm = math.sqrt((2 * degree + 1) / (4 * math.pi) * ratio * (2 if m else 1))
                found[degree, m] = norm * legendre * cosine
                if m:
                    found[degree, -m] = norm * legendre * sine
            cosine, sine = along * cosine - across * sine, across * cosine + along * sine
        return torch.stack([found[degree, m] for degree in range(self.degree) for m in range(-degree, degree + 1)], 1)

    def padded(self, encoded: Tensor) -> Tensor:
        """With ones in front."""
        return F.pad(encoded, (self.width - self.n_output, 0), value=1.0)


def _double_factorial(n: int) -> int:
    return math.prod(range(n, 0, -2))


class Grid(InputEncoding):
    """A multiresolution grid, hashed, dense or tiled (Müller et al. 2022)."""

    def __init__(self, n_input: int, options: Options) -> None:
        self.levels = GridLevels.read(n_input, options)
        self.smoothstep = options.choice("interpolation", "Linear", {"Linear": False, "Smoothstep": True})
        features, n_rows = self.levels.n_features, self.levels.offsets()[-1]
        super().__init__(n_input, self.levels.n_levels * features, n_rows * features)
        self.multiple = features

    def encode(self, x: Tensor, params: Tensor) -> Tensor:
        return encode_grid(x, params.view(-1, self.levels.n_features), self.levels, self.smoothstep)

    def initial(self, generator: Generator) -> Tensor:
        return initial_table(self.n_params, generator)

    def padded(self, encoded: Tensor) -> Tensor:
        """With zeros behind."""
        return F.pad(encoded, (0, self.width - self.n_output))


class Composite(InputEncoding):
    """Encodings of ranges of the inputs, side by side, added up or multiplied."""

    def __init__(self, n_input: int, options: Options) -> None:
        self.reduction = options.choice(
            "reduction", "Concatenation", {x: x for x in ("Concatenation", "Sum", "Product")}
        )
        nested = options.raw("nested")
        if not isinstance(nested, Sequence) or isinstance(nested, str) or not nested:
            raise TypeError(f"{options.where}: nested must be a list of dictionaries, got {shown(nested)}")
        ranges = _ranges(options.where, n_input, nested)
        self.parts = [(begin, create_encoding(n, config)) for begin, n, config in ranges if n > 0]
        encodings = [part for _, part in self.parts]
        if self.reduction == "Concatenation":
            so_far = 0
            for part, following in itertools.pairwise(encodings):
                part.widen(-(-(so_far + part.width) // following.multiple) * following.multiple - so_far)
                so_far += part.width
            width = sum(part.width for part in encodings)
        else:
            widths = [part.width for part in encodings]
            if len(set(widths)) > 1:
                raise ValueError(f"{options.where}: nested must have results of one width, got {widths}")
            width = widths[0] if widths else 0
        super().__init__(n_input, width, sum(part.n_params for part in encodings))
        self.multiple = math.lcm(*(part.multiple for part in encodings))

    def widen(self, width: int) -> None:
        """By way of the last one, or of all that are reduced."""
        if self.reduction == "Concatenation":
            last = self.parts[-1][1]
            last.widen(last.width + width - self.width)
        else:
            for _, part in self.parts:
                part.widen(width)
        self.width = self.n_output = width

    def encode(self, x: Tensor, params: Tensor) -> Tensor:
        shares = params.split([part.n_params for _, part in self.parts])
        found = [
            part(x[:, begin : begin + part.n_input], share)
            for (begin, part), share in zip(self.parts, shares, strict=True)
        ]
        if self.reduction == "Concatenation":
            return torch.cat(found, 1)
        stacked = torch.stack(found)
        return stacked.sum(0) if self.reduction == "Sum" else stacked.prod(0)

    def initial(self, generator: Generator) -> Tensor:
        return torch.cat([part.initial(generator) for _, part in self.parts])


def _ranges(where: str, n_input: int, nested: Sequence[Any]) -> list[tuple[int, int, Any]]:
    """First input and number of inputs of each nested encoding, and its configuration."""
    for config in nested:
        if not isinstance(config, Mapping):
            raise TypeError(f"{where}: nested must be a list of dictionaries, got one of {shown(config)}")
    placed = any("dims_to_encode_begin" in config for config in nested)
    rest = n_input - sum(int(config.get("n_dims_to_encode", 0)) for config in nested)
    found: list[tuple[int, int, Any]] = []
    begin, unsaid = 0, 0
    for config in nested:
        n = config.get("n_dims_to_encode")
        if n is None:
            n, unsaid = rest, unsaid + 1
            if placed or unsaid > 1:
                raise ValueError(f"{where}: n_dims_to_encode must be given, but for one without dims_to_encode_begin")
        begin = int(config.get("dims_to_encode_begin", begin))
        if n < 0 or begin < 0 or begin + n > n_input:
            raise ValueError(f"{where}: nested must encode inputs 0 to {n_input}, got {begin} to {begin + n}")
        found.append((begin, int(n), config))
        begin += int(n)
    return found


_KINDS: dict[str, Callable[[int, Options], InputEncoding]] = {
    "Composite": Composite,
    "Identity": Identity,
    "Frequency": Frequency,
    "SphericalHarmonics": SphericalHarmonics,
    "OneBlob": OneBlob,
    "Grid": Grid,
    "HashGrid": Grid,
    "TiledGrid": Grid,
    "DenseGrid": Grid,
}


def create_encoding(n_input: int, config: Any) -> InputEncoding:
    """The encoding that a dictionary describes.

    Args:
        n_input: dimensions of its inputs.
        config: with "otype" and the options of that.

    Raises:
        TypeError, ValueError: an unknown otype, or an option of the wrong kind or out of its range. Keys that are not
            options warn once.
    """
    options = Options("Encoding", config, "OneBlob")
    kinds = {name.lower(): kind for name, kind in _KINDS.items()}
    if options.otype.lower() not in kinds:
        raise ValueError(f"Encoding: otype must be {', '.join(_KINDS)}, got {shown(options.otype)}")
    for name in ("n_dims_to_encode", "dims_to_encode_begin"):  # a Composite has read them
        options.raw(name)
    encoding = kinds[options.otype.lower()](n_input, options)
    options.end()
    return encoding
