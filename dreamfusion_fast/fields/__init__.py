"""Fields of density and albedo, and backgrounds: the parameters that are optimised."""

from dreamfusion_fast.fields.background import MlpBackground, per_view, random_colors
from dreamfusion_fast.fields.base import Field, FieldOutput, evaluate, query_density
from dreamfusion_fast.fields.contraction import contract, uncontract
from dreamfusion_fast.fields.hash_field import HashGridField, HashGridFieldConfig
from dreamfusion_fast.fields.samples import FieldSamples
from dreamfusion_fast.fields.scene_field import SceneField, SceneFieldConfig
from dreamfusion_fast.fields.sdf import neus_alpha, volsdf_density
from dreamfusion_fast.fields.spherical_harmonics import spherical_harmonics
from dreamfusion_fast.fields.triplane_field import TriplaneField, TriplaneFieldConfig
from dreamfusion_fast.ops.sample_head import safe_normalize, truncated_exp

__all__ = [
    "Field",
    "FieldOutput",
    "FieldSamples",
    "HashGridField",
    "HashGridFieldConfig",
    "MlpBackground",
    "SceneField",
    "SceneFieldConfig",
    "TriplaneField",
    "TriplaneFieldConfig",
    "contract",
    "evaluate",
    "neus_alpha",
    "per_view",
    "query_density",
    "random_colors",
    "safe_normalize",
    "spherical_harmonics",
    "truncated_exp",
    "uncontract",
    "volsdf_density",
]
