"""The scene of a run: made as its config says, or as a checkpoint has it."""

from __future__ import annotations

import torch

from dreamfusion_fast.fields.background import MlpBackground
from dreamfusion_fast.rendering.occupancy import OccupancyGrid
from dreamfusion_fast.rendering.volume.renderer import VolumeRenderer
from dreamfusion_fast.scene import Scene
from dreamfusion_fast.training.checkpoint import Checkpoint, restoring
from dreamfusion_fast.training.config import Config


def make_scene(config: Config, device: torch.device, generator: torch.Generator) -> Scene:
    """The scene that a run begins with.

    Args:
        config: the run's settings.
        device: where it is to be.
        generator: on the CPU, source of the random parameters.
    """
    field = config.field.build(generator=generator).to(device)
    b, o = config.background, config.occupancy
    background = MlpBackground(b.frequencies, b.hidden, generator=generator).to(device)
    step_size = VolumeRenderer(field, None, config.renderer).step_size
    occupancy = OccupancyGrid(
        field.aabb,
        o.resolution,
        o.decay,
        o.every,
        o.warmup_steps,
        o.alpha_threshold,
        step_size,
        config.seed,
        config.renderer.backend,
    ).to(device)
    return Scene(field, occupancy, background, config.renderer)


def scene_of(checkpoint: Checkpoint, config: Config, device: torch.device) -> Scene:
    """The scene of a checkpoint, by a config of its architecture.

    Raises:
        UserError: it lacks something, or something in it has another shape.
    """
    scene = make_scene(config, device, torch.Generator())
    restore_scene(scene, checkpoint)
    return scene


def restore_scene(scene: Scene, checkpoint: Checkpoint) -> None:
    """Put a scene into the state that a checkpoint holds; UserError as in `scene_of`."""
    with restoring():
        scene.restore(checkpoint.group)
