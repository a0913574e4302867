"""The base of fields that read features of a position and make density and albedo of them by one small MLP."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamfusion_fast.fields.base import Backend, Field, FieldOutput, check_positions
from dreamfusion_fast.fields.layers import linear_layers
from dreamfusion_fast.fields.revision import HostBox
from dreamfusion_fast.ops._checks import FLOATS
from dreamfusion_fast.ops.sample_head import DensityHead, SampleHead, safe_normalize
from dreamfusion_fast.settings import Range, Settings

Self = TypeVar("Self", bound="EncodedField")


@dataclass(frozen=True)
class EncodedFieldConfig(Settings):
    """Settings of an :class:`EncodedField` but for its encoding; the defaults are those of stable-dreamfusion and
    Magic3D."""

    kind: str = ""
    """Tells the configs of fields apart."""
    hidden: Annotated[int, Range(1, 4096)] = 64
    """Width of the MLP."""
    hidden_layers: Annotated[int, Range(1, 64)] = 1
    """Hidden layers of the MLP."""
    density_activation: Literal["softplus", "exp"] = "softplus"
    """exp with the blob of DreamFusion (appendix A.2), or softplus with the blob of Magic3D (section 3)."""
    blob_scale: Annotated[float | None, Range(-1e6, 1e6)] = None
    """Height of the initial density blob; None: 5 with exp, 10 with softplus; 0: no blob."""
    blob_std: Annotated[float, Range(0, open="low")] = 0.2
    """Standard deviation of the exp blob, in scene units."""
    blob_radius: Annotated[float, Range(0, open="low")] = 0.5
    """Radius at which the softplus blob crosses zero, in scene units."""
    density_bias: Annotated[float, Range(-1e6, 1e6)] = 0.0
    """Initial bias of the density's logit: a scene starts thin with a negative one, no blob and the box as bound."""
    bound: Literal["ball", "box"] = "ball"
    """Where density may be: the ball (ellipsoid) inscribed in the scene box, or the whole box."""
    channels: Annotated[int, Range(0, 12)] = 0
    """Outputs of the MLP beside density and albedo, composited as they are: the channel `features` of a render."""
    mlp_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the operands of the MLP's products, and with float16, of what is read of the features; sums and
    parameters stay float32. auto: float16 on a GPU, float32 elsewhere."""
    backend: Backend = "native"
    """Features by the native core or by its pure-PyTorch twin."""


def shared_settings(config: EncodedFieldConfig) -> dict[str, Any]:
    """The settings that fields with any encoding have, as arguments of another config."""
    return {field.name: getattr(config, field.name) for field in fields(EncodedFieldConfig) if field.name != "kind"}


class EncodedField(Field):
    """Density and albedo from an encoding of the position and one MLP, with a density blob at the box's centre.

    A subclass makes its table, then calls :meth:`_build_decoder`, and says how the table is read.
    """

    config: EncodedFieldConfig
    layers: nn.ModuleList

    def _build_decoder(self, n_features: int, generator: torch.Generator | None) -> None:
        """The MLP, layers U(+-1/sqrt(fan in)), and what makes a density of its first output."""
        c = self.config
        self._box = HostBox()
        widths = [n_features] + [c.hidden] * c.hidden_layers + [4 + c.channels]
        self.layers = linear_layers(widths, generator)
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.bias[0] = c.density_bias
        exponential = c.density_activation == "exp"
        self._density_head = DensityHead(
            activation=c.density_activation,
            blob_scale=c.blob_scale if c.blob_scale is not None else 5.0 if exponential else 10.0,
            blob_width=c.blob_std if exponential else c.blob_radius,
            ball=c.bound == "ball",
        )

    @property
    def _table(self) -> Tensor:
        """The tensor that the encoding reads. Its dtype and device are the field's."""
        raise NotImplementedError(f"{type(self).__name__} does not define _table")

    def _features(self, unit: Tensor, scenes: Tensor | None) -> Tensor:
        """The encoding of positions `[m, 3]` in [0, 1]^3, of these scenes `[m]`."""
        raise NotImplementedError(f"{type(self).__name__} does not define _features")

    def _slopes(self, grad_features: Tensor, unit: Tensor, scenes: Tensor | None) -> Tensor:
        """The gradient of grad_features * encoding by the position, `[m, 3]`."""
        raise NotImplementedError(f"{type(self).__name__} does not define _slopes")

    def _parts(self, positions: Any) -> tuple[Tensor, Tensor | None]:
        """Positions and scenes of what `forward` is given."""
        return positions, None

    def forward(self, positions: Any, with_normal: bool = False) -> FieldOutput:
        """Density, albedo and normals.

        Normals are -grad / |grad| of the density before its activation, blob included: the same direction as the
        density's own gradient (both activations increase) and safe where the density under- or overflows. The gradient
        is derived by hand, J^T W1^T D1 W2^T ... w with J the encoding's Jacobian and D the ReLUs' masks, and
        differentiable to all parameters.

        Args:
            positions: `[m, 3]`, scene units; :class:`FieldSamples` where the field's `needs` say so.
            with_normal: whether to compute normals.

        Returns:
            density `[m]` (0 outside the bound), colour `[m, 3]` in (0, 1), normal `[m, 3]` or None; the channel
            `features` `[m, config.channels]`, if there are any.
        """
        raw = self.logits(positions, with_normal)
        return replace(raw, color=torch.sigmoid(raw.color))

    def logits(self, positions: Any, with_normal: bool = False) -> FieldOutput:
        """As :meth:`forward`, but with the albedo before its sigmoid: any number, `[m, 3]`."""
        positions, scenes = self._parts(positions)
        self._check(positions)
        unit = self._unit(positions)
        logits, hidden = self._network(self._features(unit, scenes), outputs=4 + self.config.channels)
        offsets = self._offsets(positions)
        density = self._density_head.density(logits[:, 0], offsets, unit)
        albedo = logits[:, 1:4]
        channels = {name: logits[:, 4:] for name in self._channels}
        if not with_normal:
            return FieldOutput(density, albedo, channels=channels)
        gradient = self._slopes(self._feature_gradient(hidden), unit, scenes)
        gradient = gradient * self._scale() + self._density_head.blob_gradient(offsets)
        return FieldOutput(density, albedo, -safe_normalize(gradient), channels=channels)

    def density(self, positions: Tensor) -> Tensor:
        """Density `[m]` at `positions` `[m, 3]`, without the albedo's share of the work."""
        self._check(positions)
        return self._density_anywhere(positions)

    def _density_anywhere(self, positions: Tensor) -> Tensor:
        """The density where it is not known of which scene a position is."""
        return self._density_at(positions, None)

    def _density_at(self, positions: Tensor, scenes: Tensor | None) -> Tensor:
        unit = self._unit(positions)
        logits, _ = self._network(self._features(unit, scenes), outputs=1)
        return self._density_head.density(logits[:, 0], self._offsets(positions), unit)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Refuse 16 bits, for which no op has code, in `.to`, `.half` and the like."""
        dtype = fn(self._table.detach().new_empty(0)).dtype
        if dtype not in FLOATS:
            raise TypeError(
                f"{type(self).__name__}: got {dtype} for its parameters, want {' or '.join(map(str, FLOATS))}; "
                f"{type(self.config).__name__}.mlp_dtype is the setting for half precision"
            )
        super()._apply(fn, recurse)
        return self

    def _check(self, positions: Tensor) -> None:
        check_positions(positions)
        if positions.dtype != self._table.dtype:
            raise TypeError(f"positions: got {positions.dtype}, want {self._table.dtype}, the field's")

    def _offsets(self, positions: Tensor) -> Tensor:
        """From the centre of the scene box, scene units."""
        return positions - 0.5 * (self.aabb[:3] + self.aabb[3:])

    def _scale(self) -> Tensor:
        return 1.0 / (self.aabb[3:] - self.aabb[:3])

    def _unit(self, positions: Tensor) -> Tensor:
        """Scene box to [0, 1]^3; the encoding clamps what lies outside."""
        return (positions - self.aabb[:3]) * self._scale()

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        """Weight `[out, in]` and bias `[out]` of each layer."""
        return [(layer.weight, layer.bias) for layer in self.layers if isinstance(layer, nn.Linear)]

    def _decoder_source(self) -> dict[str, Any]:
        """The members of a :class:`TileSource` that are the same for all encodings."""
        # float64 has no 16-bit mode, and a CPU none that would be faster.
        narrow = self._table.dtype == torch.float32 and self._table.is_cuda
        weights, biases = zip(*self._layers(), strict=True)
        return {
            "weights": list(weights),
            "biases": list(biases),
            "head": self._head(),
            "precision": self.precision if narrow else "float32",
            "box": self._box.read(self.aabb),
            "channels": self._channels,
        }

    @property
    def _channels(self) -> dict[str, int]:
        return {"features": self.config.channels} if self.config.channels else {}

    def _head(self) -> SampleHead:
        """How density and normals come from the MLP's outputs."""
        box = self._box.read(self.aabb)
        low, high = box[:3], box[3:]
        return SampleHead(
            centre=tuple(0.5 * (a + b) for a, b in zip(low, high, strict=True)),  # type: ignore[arg-type]
            extent=tuple(b - a for a, b in zip(low, high, strict=True)),  # type: ignore[arg-type]
            **vars(self._density_head),
        )

    def _network(self, features: Tensor, outputs: int) -> tuple[Tensor, list[Tensor]]:
        """The first `outputs` of (density logit, albedo logits, channels), `[m, outputs]`, and the MLP's hidden
        activations."""
        *inner, (weight, bias) = self._layers()
        hidden: list[Tensor] = []
        with self._autocast(features.device.type):
            x = features
            for inner_weight, inner_bias in inner:
                x = torch.relu(F.linear(x, inner_weight, inner_bias))
                hidden.append(x)
            logits = F.linear(x, weight[:outputs], bias[:outputs])
        return logits.to(features.dtype), hidden

    def _feature_gradient(self, hidden: list[Tensor]) -> Tensor:
        """Gradient of the density logit by the features, `[m, n_features]`.

        ReLU has no second derivative, so its masks are constants, and autograd does the rest for the weights.
        """
        *inner, (last_weight, _), (weight, _) = self._layers()
        # Of what passed a ReLU, the sign is its mask, as numbers in the type that the products below want.
        *masks, last_mask = (activation.detach().sign() for activation in hidden)
        with self._autocast(last_mask.device.type):
            # The output's row is the same for all samples: it goes into the matrix, not into each sample's mask.
            gradient = last_mask @ (weight[:1].T * last_weight)
            for (inner_weight, _), mask in zip(reversed(inner), reversed(masks), strict=True):
                gradient = (gradient * mask) @ inner_weight
        return gradient.to(self._table.dtype)

    @property
    def precision(self) -> str:
        """`mlp_dtype` of the config, with auto decided by the device."""
        if self.config.mlp_dtype != "auto":
            return self.config.mlp_dtype
        return "float16" if self._table.is_cuda else "float32"

    def _autocast(self, device_type: str) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(device_type, dtype=getattr(torch, self.precision))
