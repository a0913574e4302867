"""Observers of a run: a progress bar, a preview picture, curves, checkpoints. All are callbacks, like a user's own."""

from __future__ import annotations

import contextlib
import logging
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dreamfusion_fast.errors import NonFiniteError, described
from dreamfusion_fast.export import save_png, tile
from dreamfusion_fast.export.turntable import to_uint8
from dreamfusion_fast.io import RunFolder
from dreamfusion_fast.rendering.orbits import orbit_cameras
from dreamfusion_fast.rendering.shading import Shading
from dreamfusion_fast.streams import UnfailingStream, unfailing
from dreamfusion_fast.training.checkpoint import save_checkpoint
from dreamfusion_fast.training.progress import ProgressFile
from dreamfusion_fast.training.trainer import StepResult, Trainer

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_log = logging.getLogger(__name__)

PREVIEW_SIZE = 128
PREVIEW_VIEWS = 4


class Callback:
    """Override what is of interest. Every method gets the trainer, to read and to render, not to change.

    What a method raises ends the run, after a checkpoint was saved.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this call; `trainer.steps_done` is above 0 when a run is resumed."""

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """After every step."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, after an interruption, and when a step raised: wherever `on_start` was called."""


def due(result: StepResult, every: int, last: int) -> bool:
    """Whether something done every `every` steps (0: never) is due; at the last step it is, if it is done at all."""
    return every > 0 and (result.step % every == 0 or result.step == last)


class Shown(Callback):
    """Wraps a callback that shows progress and must never end a run: it is switched off at its first error.

    Args:
        name: of what is shown, for the message.
        callback: what shows it.
    """

    def __init__(self, name: str, callback: Callback) -> None:
        self._name = name
        self._callback: Callback | None = callback

    def on_start(self, trainer: Trainer) -> None:
        self._call("on_start", trainer)

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        self._call("on_step", trainer, result)

    def on_end(self, trainer: Trainer) -> None:
        self._call("on_end", trainer)

    def _call(self, method: str, trainer: Trainer, *arguments: StepResult) -> None:
        callback = self._callback
        if callback is None:
            return
        try:
            getattr(callback, method)(trainer, *arguments)
        except Exception as error:
            self._callback = None
            with contextlib.suppress(Exception):  # threads and redirected streams end all the same
                callback.on_end(trainer)
            _log.warning("%s: switched off, the run goes on (%s)", self._name, described(error))


class _BarAndLosses(Progress):
    """A bar that fits a terminal of 80 columns, and the losses in a line of their own below it."""

    losses = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.losses, overflow="ellipsis", no_wrap=True)


class ProgressBar(Callback):
    """Steps done, rate, time left and the loss terms, in the terminal."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._progress: _BarAndLosses | None = None
        self._stream: UnfailingStream | None = None
        self._task = TaskID(0)

    def on_start(self, trainer: Trainer) -> None:
        # rich draws in a thread of its own as well, and leaves the process where a pipe is closed.
        self._stream = unfailing(sys.stdout) if sys.stdout is not None else None
        self._progress = _BarAndLosses(
            TextColumn("{task.description}"),
            BarColumn(bar_width=14),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=cast("IO[str] | None", self._stream)),
        )
        prompt, steps = textwrap.shorten(trainer.config.prompt, 20, placeholder="..."), trainer.config.steps
        self._task = self._progress.add_task(escape(prompt), total=steps, completed=trainer.steps_done, rate="")
        self._progress.start()

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if self._progress is None:
            return
        fields: dict[str, Any] = {}
        if due(result, self._every, trainer.config.steps):  # reading a loss waits for a GPU
            task = self._progress.tasks[0]
            fields["rate"] = f"{task.speed:.1f} it/s" if task.speed else ""
            self._progress.losses = "  ".join(f"{name} {float(value):.3f}" for name, value in result.losses.items())
        self._progress.update(self._task, completed=result.step, **fields)
        self._check_stream()

    def on_end(self, trainer: Trainer) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._check_stream()

    def _check_stream(self) -> None:
        if self._stream is not None and self._stream.error is not None:
            raise self._stream.error


class FileOfSteps(Callback):
    """Tells a `ProgressFile` of the steps, and every `every` steps of the losses."""

    def __init__(self, file: ProgressFile, every: int) -> None:
        self._file, self._every = file, every

    def on_start(self, trainer: Trainer) -> None:
        self._file.stage("steps", trainer.steps_done, trainer.config.steps)

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        losses = None
        if due(result, self._every, trainer.config.steps):  # reading a loss waits for a GPU
            losses = {name: float(value) for name, value in result.losses.items()}
        self._file.advance(result.step, losses)


class Preview(Callback):
    """preview.png, refreshed while the run goes on: four views, below them the same views lit on white: the shape.

    Attributes:
        latest: step and picture, uint8 `[height, width, 3]`, of the last refresh.
    """

    latest: tuple[int, NDArray[np.uint8]] | None = None

    def __init__(self, path: Path, every: int) -> None:
        self._path, self._every = path, every

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if due(result, self._every, 0):
            self.draw(trainer)

    def draw(self, trainer: Trainer) -> None:
        """Refresh it now."""
        c = trainer.config.shading
        cameras = orbit_cameras(PREVIEW_VIEWS)
        images = [
            to_uint8(image)
            for shading in (Shading.ALBEDO, Shading.TEXTURELESS)
            for image in trainer.scene.render(cameras, PREVIEW_SIZE, shading, c.ambient, c.diffuse)
        ]
        picture = tile(images, PREVIEW_VIEWS)
        save_png(self._path, picture)
        self.latest = trainer.steps_done, picture


class Curves(Callback):
    """TensorBoard scalars of the losses and of how much is rendered, and the previews as pictures.

    Args:
        folder: for the event files.
        every: steps between two points.
        preview: called before this one.
    """

    def __init__(self, folder: Path, every: int, preview: Preview | None = None) -> None:
        self._folder, self._every, self._preview = folder, every, preview
        self._writer: SummaryWriter | None = None

    def on_start(self, trainer: Trainer) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote after its last checkpoint is hidden when the steps are done again.
        self._writer = SummaryWriter(str(self._folder), purge_step=trainer.steps_done + 1)

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if self._writer is not None and due(result, self._every, trainer.config.steps):
            for name, value in result.losses.items():
                self._writer.add_scalar(f"loss/{name}", float(value), result.step)
            self._writer.add_scalar("render/samples", result.samples, result.step)
            self._writer.add_scalar("render/occupied", trainer.scene.occupancy.occupied_fraction(), result.step)
        latest = None if self._preview is None else self._preview.latest
        if self._writer is not None and latest is not None and latest[0] == result.step:
            self._writer.add_image("preview", latest[1], result.step, dataformats="HWC")

    def on_end(self, trainer: Trainer) -> None:
        if self._writer is not None:
            self._writer.close()


class Checkpoints(Callback):
    """checkpoint.safetensors every so many steps and at the end, but never one that holds a NaN.

    Args:
        folder: of the run.
        every: steps; 0: none but the one at the end.
        step: of the checkpoint that is there.
    """

    def __init__(self, folder: RunFolder, every: int, step: int = 0) -> None:
        self._folder, self._every = folder, every
        self._saved: tuple[int, bool] | None = None
        self.step = step

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if due(result, self._every, trainer.config.steps):
            self.try_save(trainer)

    def try_save(self, trainer: Trainer) -> None:
        """As `save`, but log a failure to write and go on: the state in memory is worth more than its copy.

        Raises:
            NonFiniteError: as `save`.
        """
        try:
            self.save(trainer)
        except NonFiniteError:
            raise
        except Exception as error:
            _log.warning(
                "no checkpoint of step %d, that of step %d is kept (%s)",
                trainer.steps_done,
                self.step,
                described(error),
            )

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint now, unless there is one of this step and stage.

        Raises:
            NonFiniteError: a parameter is not finite; the checkpoint that was there is kept.
        """
        state = (trainer.steps_done, trainer.firmed)
        if self._saved == state:
            return
        trainer.check_parameters()
        tensors, meta = trainer.state()
        save_checkpoint(
            self._folder.checkpoint, tensors=tensors, config=trainer.config, step=trainer.steps_done, meta=meta
        )
        self._saved, self.step = state, trainer.steps_done
