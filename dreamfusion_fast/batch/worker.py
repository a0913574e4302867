"""What runs one job after another in a process of its own. Knows nothing of how jobs get there."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dreamfusion_fast.batch.jobs import Job
from dreamfusion_fast.batch.outcome import LOG, Outcome, note_begun, write_outcome
from dreamfusion_fast.errors import UserError, described, joined
from dreamfusion_fast.guidance.config import GuidanceConfig
from dreamfusion_fast.guidance.contract import Guidance
from dreamfusion_fast.io import LOCK, RunFolder
from dreamfusion_fast.training.checkpoint import load_checkpoint
from dreamfusion_fast.training.config import Config
from dreamfusion_fast.training.device import resolve_device
from dreamfusion_fast.training.generator import Generator

CreateGuidance = Callable[[GuidanceConfig, torch.device], Guidance]

# Of a GPU that is shared, what each process holds beside its tensors: CUDA's own, code and streams.
_CONTEXT = 700 << 20


class RunError(Exception):
    """A run failed; the message is one line, since errors of any kind may not survive the way to another process."""


class Worker:
    """Makes one object at a time, and keeps the guidance as long as the next run wants the same.

    Args:
        create: makes a guidance.
        threads: of torch and the CPU core.
        gpu_share: of its GPU that a run may use, where the run itself does not say.
    """

    def __init__(self, create: CreateGuidance, threads: int, gpu_share: float = 1.0) -> None:
        self._create, self._threads, self._gpu_share = create, threads, gpu_share
        self._guidance: tuple[GuidanceConfig, Guidance] | None = None

    def run(self, job: Job) -> Outcome:
        """Make the object, from its checkpoint if there is one, and write the outcome to its folder.

        Raises:
            RunError: whatever went wrong.
        """
        folder = RunFolder(Path(job.config.out))
        began, said = time.monotonic(), ""
        try:
            if not (folder.path.parent / LOCK).is_file():
                host = socket.gethostname()
                raise UserError(f"{folder.path.parent} of {host} is not the batch's: a cluster needs a shared folder")
            folder.path.mkdir(exist_ok=True)
            note_begun(folder.path, _name())
            torch.set_num_threads(self._threads)
            with _logged(folder.path / LOG):
                outcome = self._made(job.config, folder)
        except UserError as error:
            said = joined(error)
        except Exception as error:
            logging.getLogger(__name__).exception("line %d, %s", job.line, job.name)
            said = described(error)
        if said:
            self._guidance = None  # in which state it was left, nobody knows
            raise RunError(said)
        outcome = dataclasses.replace(outcome, seconds=time.monotonic() - began)
        write_outcome(folder.path, outcome)
        return outcome

    def _made(self, config: Config, folder: RunFolder) -> Outcome:
        device = resolve_device(config.device)
        config = dataclasses.replace(
            config, device=str(device), log=dataclasses.replace(config.log, progress_bar=False)
        )
        if config.memory is None and self._gpu_share < 1 and device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            config = dataclasses.replace(config, memory=int(total * self._gpu_share) - _CONTEXT)
        guidance = self._guidance_for(config.guidance, device)
        if folder.checkpoint.is_file():
            began_with = load_checkpoint(folder.checkpoint).meta.get("guidance_revision")
            same = began_with == guidance.revision
            generator = Generator.resume(folder.path, config, guidance=guidance if same else None)
        else:
            generator = Generator(config, guidance=guidance)
        result = generator.run()
        return Outcome(None, 0.0, result.steps, result.mesh.faces, result.mesh.agreement.iou, _name())

    def _guidance_for(self, config: GuidanceConfig, device: torch.device) -> Guidance:
        """The guidance of the last run, if it is the same and kept nothing of that run; else a new one."""
        if self._guidance is not None and self._guidance[0] == config:
            return self._guidance[1]
        self._guidance = None  # its memory is free before another is made
        guidance = self._create(config, device)
        if not guidance.parameter_groups() and not guidance.state():
            self._guidance = config, guidance
        return guidance


def _name() -> str:
    """Host and process, as `Outcome.worker`."""
    return f"{socket.gethostname()}, process {os.getpid()}"


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Append what the package logs in the block to a file."""
    logger, handler = logging.getLogger("dreamfusion_fast"), logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()
