"""The ops: each a `torch.library` op over the native core, with its pure-PyTorch twin ``<name>_reference`` beside it."""

from dreamfusion_fast.ops.ray_box import ray_box, ray_box_reference

__all__ = ["ray_box", "ray_box_reference"]
