"""The ops: each a `torch.library` op over the native core, its pure-PyTorch twin ``<name>_reference`` beside it."""

from dreamfusion_fast.ops.composite import (
    composite,
    composite_alpha,
    composite_alpha_reference,
    composite_reference,
)
from dreamfusion_fast.ops.hash_grid import (
    hash_grid,
    hash_grid_layout,
    hash_grid_position_gradient,
    hash_grid_position_gradient_reference,
    hash_grid_reference,
)
from dreamfusion_fast.ops.march import march, march_lattice, march_lattice_reference, march_reference
from dreamfusion_fast.ops.march_morton import (
    march_morton,
    march_morton_reference,
    march_morton_rows,
    march_morton_rows_reference,
)
from dreamfusion_fast.ops.mlp import mlp, mlp_reference, mlp_with_input_gradient, mlp_with_input_gradient_reference
from dreamfusion_fast.ops.occupancy import (
    occupancy_pack,
    occupancy_pack_reference,
    occupancy_unpack,
    occupancy_update,
    occupancy_update_reference,
)
from dreamfusion_fast.ops.ray_box import ray_box, ray_box_reference
from dreamfusion_fast.ops.traverse import traverse, traverse_reference
from dreamfusion_fast.ops.triplane import (
    triplane,
    triplane_position_gradient,
    triplane_position_gradient_reference,
    triplane_reference,
)
from dreamfusion_fast.ops.weights import (
    weights_from_alpha,
    weights_from_alpha_reference,
    weights_from_density,
    weights_from_density_reference,
)

__all__ = [
    "composite",
    "composite_alpha",
    "composite_alpha_reference",
    "composite_reference",
    "hash_grid",
    "hash_grid_layout",
    "hash_grid_position_gradient",
    "hash_grid_position_gradient_reference",
    "hash_grid_reference",
    "march",
    "march_lattice",
    "march_lattice_reference",
    "march_morton",
    "march_morton_reference",
    "march_morton_rows",
    "march_morton_rows_reference",
    "march_reference",
    "mlp",
    "mlp_reference",
    "mlp_with_input_gradient",
    "mlp_with_input_gradient_reference",
    "occupancy_pack",
    "occupancy_pack_reference",
    "occupancy_unpack",
    "occupancy_update",
    "occupancy_update_reference",
    "ray_box",
    "ray_box_reference",
    "traverse",
    "traverse_reference",
    "triplane",
    "triplane_position_gradient",
    "triplane_position_gradient_reference",
    "triplane_reference",
    "weights_from_alpha",
    "weights_from_alpha_reference",
    "weights_from_density",
    "weights_from_density_reference",
]
