"""The scene of a run: made as its config says, or as a checkpoint has it."""

from __future__ import annotations

import torch

from dreamfusion_fast.fields.background import MlpBackground
from dreamfusion_fast.rendering.occupancy import OccupancyGrid
from dreamfusion_fast.rendering.volume.renderer import VolumeRenderer
from dreamfusion_fast.scene import Scene
from dreamfusion_fast.training.amortised import SCRATCH, Nearest, field_of_prompt
from dreamfusion_fast.training.checkpoint import Checkpoint, restoring
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.fitting import fit_field
from dreamfusion_fast.training.ranks import Ranks


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


def begin_scene(scene: Scene, config: Config, ranks: Ranks | None = None) -> Nearest | None:
    """Fit the field of a new scene, and its grid, to what `config.init` makes of the prompt.

    Args:
        scene: as `make_scene` made it.
        config: of the run.
        ranks: processes that have the same scene, and get what rank 0 fits.

    Returns:
        The known caption that is nearest; where it is not near enough, the scene is left as it is. None: from scratch.

    Raises:
        UserError: the file cannot be read.
    """
    if config.init == SCRATCH:
        return None
    seed = config.seed if config.init_code is None else config.init_code
    nearest, source = field_of_prompt(config.init, config.prompt, seed)
    if source is None:
        return nearest
    field = scene.field
    if ranks is None or ranks.rank == 0:
        fit_field(field, source.to(scene.device), scene.renderer.step_size, config.seed)
    if ranks is not None:
        ranks.share(list(field.parameters()))
    scene.occupancy.update(field, 0)  # as the first step does, so that it can be looked at before
    return nearest


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
