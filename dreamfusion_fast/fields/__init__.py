"""Fields of density and albedo, and backgrounds: the parameters that are optimised."""

from dreamfusion_fast.fields.background import MlpBackground, per_view, random_colors
from dreamfusion_fast.fields.base import Field, FieldOutput, evaluate, query_density
from dreamfusion_fast.fields.hash_field import HashGridField, HashGridFieldConfig
from dreamfusion_fast.ops.sample_head import safe_normalize, truncated_exp

__all__ = [
    "Field",
    "FieldOutput",
    "HashGridField",
    "HashGridFieldConfig",
    "MlpBackground",
    "evaluate",
    "per_view",
    "query_density",
    "random_colors",
    "safe_normalize",
    "truncated_exp",
]
