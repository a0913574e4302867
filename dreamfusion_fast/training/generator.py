"""From a prompt to a folder with a textured mesh: the main job as one object."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shlex
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamfusion_fast.errors import DoesNotFitError, Interrupted, NonFiniteError, UserError, described
from dreamfusion_fast.export import TexturedMesh, export_field, render_mesh, render_preview, render_turntable
from dreamfusion_fast.guidance.config import GuidanceConfig, is_prior
from dreamfusion_fast.guidance.contract import Guidance
from dreamfusion_fast.guidance.creation import create_guidance
from dreamfusion_fast.io import RunFolder, claimed, claimed_new, open_run_folder
from dreamfusion_fast.rendering.orbits import orbit_cameras
from dreamfusion_fast.scene import Scene
from dreamfusion_fast.signals import StopRequest, stop_signals
from dreamfusion_fast.training.callbacks import (
    Callback,
    Checkpoints,
    Curves,
    FileOfSteps,
    Preview,
    ProgressBar,
    Shown,
)
from dreamfusion_fast.training.checkpoint import Checkpoint, load_checkpoint
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.device import current, resolve_device
from dreamfusion_fast.training.memory_plan import capped
from dreamfusion_fast.training.profile import StepProfile, StepProfiler
from dreamfusion_fast.training.progress import ProgressFile
from dreamfusion_fast.training.ranks import Ranks
from dreamfusion_fast.training.scenes import begin_scene, scene_of
from dreamfusion_fast.training.trainer import Trainer

_log = logging.getLogger(__name__)

# Frames of the turntable that are drawn at a time: NumPy lets go of Python's lock, and more do not help.
_PICTURE_THREADS = 8


@dataclass(frozen=True)
class RunResult:
    """The result of a run: its folder, the steps done, the mesh and, if the config asked for it, the cost of a step."""

    folder: Path
    steps: int
    mesh: TexturedMesh
    profile: StepProfile | None = None


class Generator:
    """Makes a 3D object of a prompt.

    Args:
        prompt: what to make, or a whole `Config`. With a prompt alone, the settings are those of
            `Config.for_guidance`.
        callbacks: called at the start, after every step and at the end; see `Callback`.
        guidance: a `Guidance` to use in place of the one the config names, or a `GuidanceConfig` that names another.
        ranks: processes that share the views of each step; rank 0 calls `run`, the others `assist`.
        **settings: fields of `Config`, such as `steps=500` or `out="out/armchair"`.

    Raises:
        UserError: what was asked for cannot be done; the message says why and what to do.

    Example:
        >>> import tempfile
        >>> from dreamfusion_fast import Generator
        >>> from dreamfusion_fast.training.sections import ExportConfig, LogConfig
        >>> class Watch(Callback):
        ...     def on_step(self, trainer, result):
        ...         print(f"step {result.step} of {trainer.config.steps}")
        >>> generator = Generator(
        ...     "an armchair",
        ...     callbacks=[Watch()],
        ...     out=tempfile.mkdtemp(),
        ...     steps=2,  # for a good armchair omit this and the coarse export
        ...     log=LogConfig(progress_bar=False),
        ...     export=ExportConfig(resolution=32, texture_size=64, turntable_frames=2, turntable_size=32),
        ... )
        >>> result = generator.run()
        step 1 of 2
        step 2 of 2
        >>> result.mesh.faces > 0 and (result.folder / "mesh.glb").is_file()
        True
    """

    def __init__(
        self,
        prompt: str | Config,
        callbacks: Sequence[Callback] = (),
        guidance: Guidance | GuidanceConfig | None = None,
        ranks: Ranks | None = None,
        **settings: Any,
    ) -> None:
        name = guidance.name if isinstance(guidance, GuidanceConfig) else "embedded"
        config = prompt if isinstance(prompt, Config) else Config.for_guidance(name, prompt=prompt)
        if isinstance(guidance, GuidanceConfig):
            settings["guidance"], guidance = guidance, None
        config = dataclasses.replace(config, **settings)
        config.check_start()
        self._setup(config, callbacks, guidance, ranks)

    def _setup(
        self, config: Config, callbacks: Sequence[Callback], guidance: Guidance | None, ranks: Ranks | None
    ) -> None:
        config.check()
        self.callbacks = list(callbacks)
        self._ranks = ranks
        self.device = resolve_device(config.device) if ranks is None else ranks.device
        self.config = config
        self._guidance = guidance
        self._checkpoint: Checkpoint | None = None
        self._folder: RunFolder | None = None
        self._begun = False
        self._shows_start = False
        self._scene: Scene | None = None
        self._progress = ProgressFile(None, 0.0)

    @classmethod
    def resume(
        cls,
        run: str | Path,
        config: Config | None = None,
        callbacks: Sequence[Callback] = (),
        guidance: Guidance | None = None,
        ranks: Ranks | None = None,
    ) -> Generator:
        """Continue the run in folder `run`, with its own config or with one of the same architecture.

        Raises:
            UserError: `run` holds no run, its checkpoint is corrupt, or of another config than `config`.
        """
        folder = open_run_folder(run, writable=False)  # an export to elsewhere only reads it
        checkpoint = load_checkpoint(folder.checkpoint, config)
        generator = cls.__new__(cls)
        generator._setup(checkpoint.config if config is None else config, callbacks, guidance, ranks)
        generator._checkpoint, generator._folder = checkpoint, folder
        return generator

    def run(self) -> RunResult:
        """Optimise, then export. Once: to go on with what was made, `Generator.resume` its folder.

        Whatever ends it early, a checkpoint of the last whole step is written, unless that holds a NaN, and it is
        logged how to continue. What only shows progress, such as the preview, is switched off where it fails.

        Raises:
            Interrupted: a KeyboardInterrupt on Ctrl-C, SIGTERM or SIGHUP, after the step in progress; at the second
                one at once and without a checkpoint. In the main thread only.
            UserError: a used or unwritable folder, one that another process writes to, a second call, a NaN in
                training, no surface to export, too little memory.
            Exception: what a callback raised.
        """
        with (
            stop_signals(),
            current(self.device),
            capped(self.config.memory, self.device),
            self._claimed() as folder,
        ):
            return self._run(folder)

    def assist(self) -> None:
        """Take part in the steps of a run whose files rank 0 writes, until they are done or it stops.

        Raises:
            Interrupted, UserError: as `run`.
        """
        with stop_signals(), current(self.device), capped(self.config.memory, self.device):
            trainer = self._trainer(self._resumed_guidance() if self._guidance is None else self._guidance)
            trainer.load_guidance()
            with stop_signals(deferred=True) as stop:
                while self._goes_on(trainer, stop):
                    trainer.step()
            if stop.number is not None:
                raise Interrupted(stop.number)

    def _goes_on(self, trainer: Trainer, stop: StopRequest) -> bool:
        """Whether there is another step to do; of several processes, whether all of them do it."""
        if self._ranks is None:
            return trainer.steps_done < self.config.steps and not stop.made()
        self._ranks.stop_wanted = stop.made()
        return trainer.steps_done < self.config.steps and not self._ranks.stop()

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[RunFolder]:
        """The run's folder, kept from other runs until the block ends."""
        if self._begun:
            raise UserError("this Generator has run; continue with Generator.resume(folder), or make another one")
        of = self._folder
        with claimed_new(self.config.out, self.config.prompt) if of is None else claimed(of.path) as folder:
            if self._checkpoint is not None:  # another process may have gone on since resume() read it
                self._checkpoint = load_checkpoint(folder.checkpoint, self.config)
            yield folder

    def _run(self, folder: RunFolder) -> RunResult:
        started = time.monotonic()
        profiler = StepProfiler(self.device) if self.config.profile else None
        guidance = self._resumed_guidance() if self._guidance is None else self._guidance
        trainer = self._trainer(guidance, profiler)
        config = self.config
        self._folder, self._begun = folder, True
        checkpoints = Checkpoints(folder, config.log.checkpoint_every, trainer.steps_done)
        if self._checkpoint is None:
            checkpoints.save(trainer)  # from here on the run can be resumed, whatever happens
        config.save(folder.config)
        if config.log.progress_every:
            self._progress = ProgressFile(folder.progress, config.log.progress_every)
        self._progress.stage("loading")
        for line in trainer.planner.lines(trainer.plan):
            _log.info(line)
        if self._shows_start and config.log.preview_every:
            with _shown(folder.preview):
                Preview(folder.preview, config.log.preview_every).draw(trainer)
                _log.info("%s shows what the run starts from, after %.1f s", folder.preview, time.monotonic() - started)
        if not is_prior(config.guidance.name):
            self._load(trainer, folder)

        def progress() -> str:
            done, saved = trainer.steps_done, checkpoints.step
            return f"after step {done} of {config.steps}" + (f", saved is step {saved}" if saved != done else "")

        try:
            with _resumable(folder, progress), stop_signals(deferred=True) as stop:
                self._train(trainer, folder, checkpoints, stop)
        finally:  # also on Ctrl-C
            profile = None if profiler is None else profiler.result()
            if profile is not None:
                _log.info(profile.table())
        self._scene = trainer.scene
        with _resumable(folder, lambda: "during the export"):
            mesh = self._export(trainer.scene, folder)
        self._progress.stage("done")
        return RunResult(folder.path, trainer.steps_done, mesh, profile)

    def _resumed_guidance(self) -> Guidance | None:
        """The model of a resumed run at the commit that it began with, or None where a new one is as good.

        Says so where the run goes on with another model.
        """
        if self._checkpoint is None:
            return None
        began, now = self._checkpoint.config.guidance, self.config.guidance
        if began.name != now.name:
            _log.warning("this run was guided by %s, and goes on with %s", began.name, now.name)
            return None
        revision = self._checkpoint.meta.get("guidance_revision")
        if revision is None or began.revision != now.revision:
            return None
        return create_guidance(dataclasses.replace(now, revision=revision), self.device)

    def _trainer(self, guidance: Guidance | None, profiler: StepProfiler | None = None) -> Trainer:
        trainer = Trainer(self.config, self.device, guidance, profiler, self._ranks)
        self.config = trainer.config
        if self._checkpoint is None:
            self._begin(trainer)
        else:
            trainer.restore(self._checkpoint)
            began = self._checkpoint.meta.get("guidance_files")
            for path, digest in trainer.guidance.files.items():
                if isinstance(began, dict) and began.get(path, digest) != digest:
                    _log.warning("%s has changed since this run began, which goes on with what it holds now", path)
        if self._ranks is not None:
            config = dataclasses.replace(self.config, out="", device="")
            self._ranks.check_same([trainer.steps_done, zlib.crc32(config.to_yaml().encode())], "step or settings")
        return trainer

    def _begin(self, trainer: Trainer) -> None:
        """Put what `config.init` makes of the prompt into the scene of a new run, and say so."""
        nearest = begin_scene(trainer.scene, self.config, self._ranks)
        if nearest is None:
            return
        shown = f'"{nearest.phrase}", similarity {nearest.similarity:.2f}'
        if nearest.known:
            _log.info("starts from what --init %s makes of the prompt (nearest: %s)", self.config.init, shown)
        else:
            _log.info("starts from scratch: --init %s does not know the prompt (nearest: %s)", self.config.init, shown)
        self._shows_start = nearest.known

    def _load(self, trainer: Trainer, folder: RunFolder) -> None:
        """Load the diffusion model, and say what of it takes time."""
        compiled = self.device.type != "cpu" and self.config.guidance.fused and not trainer.plan.offload
        later = "; its kernels are compiled and captured in the first step" if compiled else ""
        _log.info("loading %s%s", trainer.guidance.name, later)
        with _resumable(folder, lambda: f"before step {trainer.steps_done + 1}"):
            trainer.load_guidance()

    def _train(self, trainer: Trainer, folder: RunFolder, checkpoints: Checkpoints, stop: StopRequest) -> None:
        log = self.config.log
        callbacks: list[Callback] = [checkpoints]
        if log.progress_bar:
            callbacks.append(Shown("progress bar", ProgressBar(log.log_every)))
        if log.progress_every:
            callbacks.append(Shown(folder.progress.name, FileOfSteps(self._progress, log.log_every)))
        preview = Preview(folder.preview, log.preview_every) if log.preview_every else None
        if preview is not None:
            callbacks.append(Shown(folder.preview.name, preview))
        if log.tensorboard:
            callbacks.append(Shown("curves", Curves(folder.tensorboard, log.log_every, preview)))
        callbacks += self.callbacks
        with contextlib.ExitStack() as ending:  # each that was started is ended, the last one first
            for callback in callbacks:
                ending.callback(callback.on_end, trainer)
                callback.on_start(trainer)
            try:
                self._optimise(trainer, callbacks, checkpoints, stop)
            except NonFiniteError as error:
                raise UserError(f"{error}; the last good checkpoint is {folder.checkpoint}") from error
            except Interrupted:  # the second signal: at once
                raise
            except BaseException:
                with contextlib.suppress(NonFiniteError):
                    checkpoints.try_save(trainer)  # of the last whole step
                raise
        if stop.number is not None:
            raise Interrupted(stop.number)
        if trainer.steps_done < self.config.steps:  # another process was asked to
            raise Interrupted(signal.SIGTERM)

    def _optimise(
        self, trainer: Trainer, callbacks: Sequence[Callback], checkpoints: Checkpoints, stop: StopRequest
    ) -> None:
        while self._goes_on(trainer, stop):
            result = trainer.step()
            for callback in callbacks:
                callback.on_step(trainer, result)
        if self._ranks is not None:
            self._ranks.leave()  # the rest is done by this process alone
        checkpoints.try_save(trainer)
        cut = trainer.steps_done < self.config.steps
        if self.config.firm.steps and not trainer.firmed and not cut and not stop.made():
            self._progress.stage("firm", 0, self.config.firm.steps)

            def stopped() -> bool:  # asked after each of its steps
                self._progress.advance()
                return stop.made()

            trainer.firm(stopped)
            checkpoints.try_save(trainer)

    def export(self, out: str | Path | None = None) -> TexturedMesh:
        """Make mesh, turntable and preview of a finished or resumed run again, into `out` or its own folder."""
        if self._folder is None:
            raise UserError("there is nothing to export yet: run() first, or Generator.resume(folder)")
        with current(self.device), claimed(self._folder.path if out is None else out) as folder:
            return self._export(self.scene(), folder)

    def scene(self) -> Scene:
        """The scene that `run` made, or as a resumed run left it. No diffusion model is loaded."""
        if self._scene is None:
            if self._checkpoint is None:
                raise UserError("there is no scene yet: run() first, or Generator.resume(folder)")
            self._scene = scene_of(self._checkpoint, self.config, self.device)
        return self._scene

    def _export(self, scene: Scene, folder: RunFolder) -> TexturedMesh:
        e = self.config.export
        self._progress.stage("export", 0, e.turntable_frames + e.preview_views)
        mesh = export_field(
            scene.field,
            scene.field.aabb,
            folder.mesh,
            resolution=e.resolution,
            threshold=e.threshold,
            smooth_iterations=e.smooth_iterations,
            min_component=e.min_component,
            target_faces=e.target_faces,
            texture_size=e.texture_size,
            renderer=scene.renderer,
        )

        def picture(azimuth: float) -> NDArray[np.uint8]:
            camera = orbit_cameras(1, e.elevation_deg, start_deg=azimuth)
            image = render_mesh(mesh.unwrapped, mesh.texture, camera, 0, e.turntable_size)
            self._progress.advance()
            return image

        with _dispensable(folder.preview):
            render_preview(picture, folder.preview, e.preview_views)
        if e.turntable_frames:
            with _dispensable(folder.turntable):
                render_turntable(
                    picture,
                    folder.turntable,
                    n_frames=e.turntable_frames,
                    fps=e.turntable_fps,
                    threads=min(os.cpu_count() or 1, _PICTURE_THREADS),
                )
        return mesh


@contextlib.contextmanager
def _resumable(folder: RunFolder, when: Callable[[], str]) -> Iterator[None]:
    """If the block raises, log when the run stopped and how to continue it."""
    resume = f"dreamfusion-fast generate --resume {shlex.quote(str(folder.path))}"
    try:
        yield
    except DoesNotFitError as error:
        raise UserError(f"{error}; with such settings added, continue: {resume}") from error
    except BaseException:
        _log.warning("stopped %s; continue: %s", when(), resume)
        raise


@contextlib.contextmanager
def _dispensable(picture: Path) -> Iterator[None]:
    """Log an error in the block, which then costs this picture of the mesh alone."""
    try:
        yield
    except Exception as error:
        _log.warning(
            "no %s (%s); the mesh is there, and dreamfusion-fast export makes it again",
            picture.name,
            described(error),
        )


@contextlib.contextmanager
def _shown(picture: Path) -> Iterator[None]:
    """Log an error in the block, which then costs a picture of the way alone."""
    try:
        yield
    except Exception as error:
        _log.warning("no %s yet, the run goes on (%s)", picture.name, described(error))
