"""What watches a run: a progress bar, a preview picture, curves, checkpoints. All of them are callbacks, as a user's own are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamfusion_fast.export import render_preview
from dreamfusion_fast.io import RunFolder
from dreamfusion_fast.training.checkpoint import save_checkpoint
from dreamfusion_fast.training.trainer import StepResult, Trainer

if TYPE_CHECKING:
    from rich.progress import Progress

PREVIEW_SIZE = 128
PREVIEW_VIEWS = 4


class Callback:
    """Override what is of interest; every method gets the trainer, whose state may be read (and rendered) but not changed."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this call; `trainer.steps_done` is above 0 when a run is resumed."""

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """After every step."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, after an interruption, and when a step raised."""


def due(result: StepResult, every: int, last: int) -> bool:
    """Whether something done every `every` steps (0: never) is due; always true at the last step if it is done at all."""
    return every > 0 and (result.step % every == 0 or result.step == last)


class ProgressBar(Callback):
    """Steps done, rate, time left and the loss terms, in the terminal."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._progress: Progress | None = None
        self._task: Any = None

    def on_start(self, trainer: Trainer) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
        )
        self._task = self._progress.add_task(
            trainer.config.prompt, total=trainer.config.steps, completed=trainer.steps_done, rate="", losses=""
        )
        self._progress.start()

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        assert self._progress is not None
        fields = {}
        if due(result, self._every, trainer.config.steps):  # reading a loss waits for a GPU
            task = self._progress.tasks[0]
            fields["rate"] = f"{task.speed:.1f} it/s" if task.speed else ""
            fields["losses"] = " ".join(f"{name} {float(value):.3f}" for name, value in result.losses.items())
        self._progress.update(self._task, completed=result.step, **fields)

    def on_end(self, trainer: Trainer) -> None:
        if self._progress is not None:
            self._progress.stop()


class Preview(Callback):
    """preview.png, refreshed while the run goes on: four views, and the same views lit on white, which shows the shape."""

    def __init__(self, path: Path, every: int) -> None:
        self._path, self._every = path, every

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if due(result, self._every, 0):
            render_preview(lambda azimuth: trainer.render_view(azimuth, PREVIEW_SIZE), self._path, PREVIEW_VIEWS)


class Curves(Callback):
    """TensorBoard scalars of the losses and of how much is rendered."""

    def __init__(self, folder: Path, every: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer, self._every = SummaryWriter(str(folder)), every

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if due(result, self._every, trainer.config.steps):
            for name, value in result.losses.items():
                self._writer.add_scalar(f"loss/{name}", float(value), result.step)
            self._writer.add_scalar("render/samples", result.samples, result.step)
            self._writer.add_scalar("render/occupied", trainer.occupancy.occupied_fraction(), result.step)

    def on_end(self, trainer: Trainer) -> None:
        self._writer.close()


class Checkpoints(Callback):
    """checkpoint.safetensors every so many steps and at the end, but never one that holds a NaN."""

    def __init__(self, folder: RunFolder, every: int) -> None:
        self._folder, self._every = folder, every
        self._saved_step = -1

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if due(result, self._every, trainer.config.steps):
            trainer.check_finite(result)
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint now, unless this step's is there."""
        if self._saved_step == trainer.steps_done:
            return
        tensors, meta = trainer.state()
        save_checkpoint(self._folder.checkpoint, tensors=tensors, config=trainer.config, step=trainer.steps_done, meta=meta)
        self._saved_step = trainer.steps_done
