"""The settings of a validation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance.config import GuidanceConfig
from dreamfusion_fast.settings import Range, Settings
from dreamfusion_fast.training.memory_plan import parse_memory


@dataclass(frozen=True)
class ValidateConfig(Settings):
    """What `validate` is told."""

    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)
    prompt: str = "a chair"
    """The object; one that the model is sure to know, seen from any side."""
    steps: Annotated[int, Range(2, 100_000)] = 300
    """Steps of the short run."""
    picture_steps: Annotated[int, Range(2, 1000)] = 40
    """Denoising steps of a picture."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Seeds everything random."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:1."""
    memory: str | int | None = None
    """Memory the run may use, such as 16GB."""
    out: str = "validation"
    """Folder for index.html and validation.json."""
    overwrite: bool = False
    """Replace an existing report; otherwise a folder that holds one is refused."""

    def check(self) -> None:
        """Raise UserError for an empty prompt, or a memory that is no size."""
        if not self.prompt.strip():
            raise UserError('the prompt is empty; say what to make, such as "a chair"')
        if self.memory is not None:
            parse_memory(self.memory)
