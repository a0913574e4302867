"""The hash grid of this package as a geometry of threestudio, which the renderer streams."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional

import threestudio
import torch
from threestudio.models.geometry.base import BaseImplicitGeometry
from torch import Tensor, nn

if TYPE_CHECKING:  # the ops behind it take longer to import than a plug-in should before it is used
    from dreamfusion_fast.fields import HashGridFieldConfig

NAME = "dreamfusion-fast-hash-grid"

# With each initial blob, the activations that it goes with here: of the same names, or with the same values.
_BLOBS = {"blob_magic3d": ("softplus",), "blob_dreamfusion": ("exp", "trunc_exp")}
_ACTIVATIONS = {"softplus": "softplus", "exp": "exp", "trunc_exp": "exp"}
_ENCODING = {
    "otype": "HashGrid",
    "n_levels": 16,
    "n_features_per_level": 2,
    "log2_hashmap_size": 19,
    "base_resolution": 16,
    "per_level_scale": 1.447269237440378,
}
_NETWORK = {
    "otype": "VanillaMLP",
    "activation": "ReLU",
    "output_activation": "none",
    "n_neurons": 64,
    "n_hidden_layers": 1,
}
_NETWORK_TYPES = ("VanillaMLP", "FullyFusedMLP", "CutlassMLP")


@threestudio.register(NAME)
class HashGridGeometry(BaseImplicitGeometry):
    """Density and features of a :class:`HashGridField`: the config names of `implicit-volume`, as far as they go.

    One network, with biases, gives density and features, where `implicit-volume` has two without. The grid's levels lie
    as this package has them, so that weights of one geometry do not load in the other.

    For optimisers with groups of their own, `geometry.encoding` is the table of the grid, `geometry.network` the rest.

    Raises:
        ValueError: a setting that cannot be honoured.
    """

    @dataclass
    class Config(BaseImplicitGeometry.Config):
        """As of `implicit-volume`, and one key more."""

        n_input_dims: int = 3
        """Only 3."""
        n_feature_dims: int = 3
        """From 3 to 15."""
        density_activation: Optional[str] = "softplus"  # noqa: UP045 (OmegaConf)
        """softplus, exp or trunc_exp, which is what exp does, too."""
        density_bias: Any = "blob_magic3d"
        """blob_magic3d with softplus, blob_dreamfusion with exp, or a number."""
        density_blob_scale: float = 10.0
        density_blob_std: float = 0.5
        pos_encoding_config: dict = field(default_factory=lambda: dict(_ENCODING))
        """Of type HashGrid, or Grid with Hash; `interpolation` is Linear or Smoothstep."""
        mlp_network_config: dict = field(default_factory=lambda: dict(_NETWORK))
        """Of any type: it is run by the renderer's kernels."""
        normal_type: Optional[str] = "analytic"  # noqa: UP045
        """analytic, or null for none."""
        isosurface_threshold: Any = "auto"
        mlp_dtype: str = "auto"
        """Of the operands of the network's products: float32, bfloat16, float16, or auto: float16 on a GPU."""

    cfg: Any

    def configure(self) -> None:
        """Make the field."""
        from dreamfusion_fast.fields import HashGridField

        super().configure()
        r = float(self.cfg.radius)
        self.field = HashGridField(field_config(self.cfg), (-r, -r, -r, r, r, r))

    @property
    def encoding(self) -> nn.Parameter:
        """The table of the hash grid."""
        return self.field.table

    @property
    def network(self) -> nn.Module:
        """The network behind it."""
        return self.field.layers

    def forward(self, points: Tensor, output_normal: bool = False) -> dict[str, Tensor]:
        """Density `[..., 1]`, features `[..., n_feature_dims]`, and unit normals if asked for, at points `[..., 3]`."""
        if output_normal and self.cfg.normal_type is None:
            raise ValueError(f"{NAME}: normal_type: got null, want 'analytic' with a material that reads normals")
        shape = points.shape[:-1]
        output = self.field.logits(self._flat(points), with_normal=output_normal)
        assert output.density is not None
        known = {
            "density": output.density.view(*shape, 1),
            "features": torch.cat([output.color, *output.channels.values()], dim=1).view(*shape, -1),
        }
        if output.normal is not None:
            normal = output.normal.view(*shape, 3)
            known |= {"normal": normal, "shading_normal": normal}
        return known

    def forward_density(self, points: Tensor) -> Tensor:
        """Density `[..., 1]` at points `[..., 3]`."""
        return self.field.density(self._flat(points)).view(*points.shape[:-1], 1)

    def forward_field(self, points: Tensor) -> tuple[Tensor, None]:
        """The field whose level set is the surface, and no deformation."""
        return self.forward_density(points), None

    def forward_level(self, field: Tensor, threshold: float) -> Tensor:
        """Below 0 inside."""
        return threshold - field

    def export(self, points: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Features `[..., n_feature_dims]` of points on the surface."""
        return {"features": self(points)["features"]}

    def _flat(self, points: Tensor) -> Tensor:
        return points.reshape(-1, 3).to(self.field.table.dtype)


def is_sigmoid(geometry: HashGridGeometry, material: Any) -> bool:
    """Whether this material's colours are those of the geometry's field: `no-material`, with a sigmoid of features."""
    try:
        plain = threestudio.find("no-material")
    except (KeyError, ValueError):
        return False
    return (
        type(material) is plain
        and not material.requires_normal
        and not getattr(material, "use_network", False)
        and material.cfg.color_activation == "sigmoid"
        and material.cfg.n_output_dims == geometry.cfg.n_feature_dims == 3
    )


def field_config(cfg: Any) -> "HashGridFieldConfig":
    """The settings of the field, or ValueError naming the key that cannot be honoured."""
    from dreamfusion_fast.fields import HashGridFieldConfig

    if cfg.n_input_dims != 3:
        raise _refusal("n_input_dims", cfg.n_input_dims, "3")
    if not 3 <= cfg.n_feature_dims <= 15:
        raise _refusal("n_feature_dims", cfg.n_feature_dims, "3 to 15")
    if cfg.normal_type not in ("analytic", None):
        raise _refusal("normal_type", cfg.normal_type, "'analytic' or null")
    encoding = _known("pos_encoding_config", cfg.pos_encoding_config, {*_ENCODING, "type", "interpolation"})
    if encoding["otype"] not in ("HashGrid", "Grid") or encoding.get("type", "Hash") != "Hash":
        given = {name: encoding[name] for name in ("otype", "type") if name in encoding}
        raise _refusal("pos_encoding_config", given, "otype HashGrid")
    if encoding.get("interpolation", "Linear") not in ("Linear", "Smoothstep"):
        raise _refusal("pos_encoding_config.interpolation", encoding["interpolation"], "Linear or Smoothstep")
    network = _known("mlp_network_config", cfg.mlp_network_config, {*_NETWORK})
    if network["otype"] not in _NETWORK_TYPES:
        raise _refusal("mlp_network_config.otype", network["otype"], " or ".join(_NETWORK_TYPES))
    if network.get("activation", "ReLU") != "ReLU":
        raise _refusal("mlp_network_config.activation", network["activation"], "ReLU")
    if str(network.get("output_activation")).lower() != "none":
        raise _refusal("mlp_network_config.output_activation", network["output_activation"], "none")
    full = {**_ENCODING, **encoding}
    coarsest = int(full["base_resolution"])
    finest = coarsest * float(full["per_level_scale"]) ** (int(full["n_levels"]) - 1)
    return HashGridFieldConfig(
        levels=full["n_levels"],
        features=full["n_features_per_level"],
        log2_rows=full["log2_hashmap_size"],
        base_resolution=coarsest,
        finest_resolution=math.floor(finest + 1e-3),  # a scale is a root that was rounded
        smoothstep=full.get("interpolation") == "Smoothstep",
        hidden={**_NETWORK, **network}["n_neurons"],
        hidden_layers={**_NETWORK, **network}["n_hidden_layers"],
        bound="box",
        channels=cfg.n_feature_dims - 3,
        mlp_dtype=cfg.mlp_dtype,
        **_density(cfg),
    )


def _density(cfg: Any) -> dict[str, Any]:
    """How the density begins."""
    if cfg.density_activation not in _ACTIVATIONS:
        raise _refusal("density_activation", cfg.density_activation, " or ".join(_ACTIVATIONS))
    activation, bias = _ACTIVATIONS[cfg.density_activation], cfg.density_bias
    if isinstance(bias, float | int) and not isinstance(bias, bool):
        return {"density_activation": activation, "blob_scale": 0.0, "density_bias": float(bias)}
    if bias not in _BLOBS:
        raise _refusal("density_bias", bias, f"a number or {' or '.join(_BLOBS)}")
    if cfg.density_activation not in _BLOBS[bias]:
        wanted = " or ".join(_BLOBS[bias])
        raise _refusal("density_activation", cfg.density_activation, f"{wanted} with density_bias {bias}")
    width = "blob_radius" if activation == "softplus" else "blob_std"
    return {"density_activation": activation, "blob_scale": cfg.density_blob_scale, width: cfg.density_blob_std}


def _known(name: str, given: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    unknown = sorted(set(given) - keys)
    if unknown:
        raise _refusal(name, ", ".join(unknown), f"only {', '.join(sorted(keys))}")
    if "otype" not in given:
        raise _refusal(name, "no otype", "one")
    return dict(given)


def _refusal(name: str, given: Any, want: str) -> ValueError:
    return ValueError(f"{NAME}: {name}: got {given!r}, want {want}; implicit-volume has the rest")
