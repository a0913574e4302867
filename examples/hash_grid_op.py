"""One op beside its pure-PyTorch twin: the hash grid, native and by `hash_grid_reference`, give the same features."""

import torch

from dreamfusion_fast.ops import hash_grid, hash_grid_layout, hash_grid_reference

level_offsets, resolutions = hash_grid_layout(levels=4, base_resolution=8, finest_resolution=64, log2_rows=12)
table = torch.randn(int(level_offsets[-1]), 2, requires_grad=True)
positions = torch.rand(113, 3, requires_grad=True)
features = hash_grid(positions, table, level_offsets, resolutions)  # [113, 8], twice differentiable
torch.testing.assert_close(features, hash_grid_reference(positions, table, level_offsets, resolutions))
