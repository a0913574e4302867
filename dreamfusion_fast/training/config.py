"""Everything a run can be told, as one tree of dataclasses.

The parts bring their own configs; `sections` has those of the loop. Every field can be set from a YAML file and from
the command line (`--optim.lr-table 0.01`), and the resolved tree is saved with the run.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import AvoidSubcommands, Positional, arg

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.fields.hash_field import HashGridFieldConfig
from dreamfusion_fast.fields.triplane_field import TriplaneFieldConfig
from dreamfusion_fast.guidance.config import GuidanceConfig
from dreamfusion_fast.guidance.contract import T_RANGE
from dreamfusion_fast.rendering.config import RendererConfig
from dreamfusion_fast.rendering.orbits import CameraConfig
from dreamfusion_fast.settings import Range, Settings
from dreamfusion_fast.training import config_io
from dreamfusion_fast.training.amortised import AMORTISED, check_init
from dreamfusion_fast.training.memory_plan import parse_memory
from dreamfusion_fast.training.opaque import OpaqueThresholds
from dreamfusion_fast.training.presets import preset_text, settings_for
from dreamfusion_fast.training.sections import (
    SMALL_FIELD,
    BackgroundConfig,
    ExportConfig,
    FirmConfig,
    LogConfig,
    LossConfig,
    OccupancyConfig,
    OptimConfig,
    ScheduleConfig,
    ShadingConfig,
    field_of_kind,
)

_log = logging.getLogger(__name__)

_BATCH = {"cpu": 2}  # views per step on a device, where a config does not say


def _without_t_range(values: Any, source: str) -> Any:
    """`values` without guidance.t_range, which configs of older versions hold and no run has ever read."""
    guidance = values.get("guidance") if isinstance(values, Mapping) else None
    if not isinstance(guidance, Mapping) or "t_range" not in guidance:
        return values
    if guidance["t_range"] != list(T_RANGE):  # not just the old default
        _log.warning(
            "%s: guidance.t_range is ignored, as it always was in a run; "
            "set schedule.t_min, schedule.t_max and schedule.t_max_end",
            source,
        )
    return {**values, "guidance": {key: value for key, value in guidance.items() if key != "t_range"}}


def _with_ray_entropy(values: Any) -> Any:
    """`values` with loss.ray_entropy in place of loss.entropy, its name in older versions."""
    loss = values.get("loss") if isinstance(values, Mapping) else None
    if not isinstance(loss, Mapping) or "entropy" not in loss:
        return values
    return {**values, "loss": {"ray_entropy" if key == "entropy" else key: value for key, value in loss.items()}}


@dataclass(frozen=True)
class Config(Settings):
    """One run, from a prompt to a mesh."""

    prompt: Annotated[Positional[str], arg(metavar="PROMPT")] = ""
    """The object to make."""
    out: str = ""
    """Folder for everything the run writes; by default out/ and the prompt. A folder that holds a run is refused."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Seeds everything random. On a CPU the same seed gives the same mesh."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:1."""
    steps: Annotated[int, Range(1)] = 1000
    """Optimiser steps."""
    batch: Annotated[int | None, Range(1)] = None
    """Views per step; by default 8 on a GPU, where they cost little more than 2, and 2 on a CPU, or as many more as a
    model reads together."""
    memory: str | int | None = None
    """Memory the run may use, such as 16GB, 16GiB, 16000MB or bytes; by default what the GPU has free."""
    profile: bool = False
    """Print at the end how long each stage of a step takes and how much memory."""
    init: str = AMORTISED
    """What the field starts from. amortised: what a network that has seen many objects makes of the prompt, where it
    knows it (`training.amortised`); the path of a file: the same by another network; scratch: a grey ball."""
    init_code: Annotated[int | None, Range(0, 2**63 - 1)] = None
    """Seed that draws which of the objects it has seen under such a prompt is meant; by default the run's seed."""
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)
    camera: CameraConfig = dataclasses.field(default_factory=CameraConfig)
    field: Annotated[HashGridFieldConfig | TriplaneFieldConfig, AvoidSubcommands] = dataclasses.field(
        default_factory=lambda: SMALL_FIELD, metadata=config_io.ARCHITECTURE
    )
    renderer: RendererConfig = dataclasses.field(default_factory=lambda: RendererConfig(samples_across=128))
    occupancy: OccupancyConfig = dataclasses.field(default_factory=OccupancyConfig)
    background: BackgroundConfig = dataclasses.field(default_factory=BackgroundConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    shading: ShadingConfig = dataclasses.field(default_factory=ShadingConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    opaque: OpaqueThresholds = dataclasses.field(default_factory=OpaqueThresholds)
    firm: FirmConfig = dataclasses.field(default_factory=FirmConfig)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)

    def with_field(self, kind: str) -> Config:
        """The same run with the kind of field called "hash_grid" or "triplane" (`sections.field_of_kind`).

        Raises:
            UserError: there is no such kind.
        """
        return dataclasses.replace(self, field=field_of_kind(kind, self.field))

    def batch_on(self, device: torch.device, group: int = 1) -> int:
        """Views per step of a run on `device`; by default whole groups of so many."""
        return self.batch if self.batch is not None else -(-_BATCH.get(device.type, 8) // group) * group

    def check(self) -> None:
        """Raise UserError for what no run can start with, such as an empty prompt."""
        if not self.prompt.strip():
            raise UserError('the prompt is empty; say what to make, such as "an armchair"')
        if isinstance(self.field, TriplaneFieldConfig) and self.field.scenes > 1:
            raise UserError(f"--field.scenes: got {self.field.scenes}, want 1: a run makes one scene")
        if self.memory is not None:
            parse_memory(self.memory)

    def check_start(self) -> None:
        """Raise UserError for what no new run can start with: as `check`, and a file of `init` that is none."""
        self.check()
        check_init(self.init)

    @classmethod
    def for_guidance(cls, name: str, **settings: Any) -> Config:
        """The config of a run that the model called `name` guides (`presets`); `settings` are fields, and win."""
        return cls(**({"guidance": GuidanceConfig(name=name)} | settings_for(name) | settings))

    @classmethod
    def from_preset(cls, name: str, **settings: Any) -> Config:
        """The config of a published recipe (`presets.preset_names`); `settings` are fields, and win.

        Raises:
            UserError: there is no preset of this name.
        """
        config = cls.from_yaml(preset_text(name), source=f"preset {name}")
        return dataclasses.replace(config, **settings)

    def to_dict(self) -> dict[str, Any]:
        """The tree as nested dicts of plain values."""
        return config_io.to_dict(self)

    def to_yaml(self) -> str:
        """The tree as YAML text; `Config.from_yaml` reads it back."""
        return config_io.dump_yaml(self)

    def save(self, path: str | Path) -> None:
        """Write the tree to a YAML file, whole or not at all."""
        config_io.save_yaml(self, path)

    @classmethod
    def from_dict(
        cls, values: Any, *, source: str = "config", guidance: str | None = None, base: Config | None = None
    ) -> Config:
        """Read a tree from nested dicts; what they do not hold is as `base`, or as `for_guidance`, has it.

        Args:
            values: keys of the tree.
            source: what errors call their origin, such as the file's name.
            guidance: name of the model; by default the one in `values`.
            base: such as a preset's.

        Raises:
            UserError: an unknown key, a wrong type, or a value that is refused.
        """
        values = _with_ray_entropy(_without_t_range(values, source))
        if base is None and guidance is None:
            given = values.get("guidance") if isinstance(values, Mapping) else None
            guidance = given.get("name") if isinstance(given, Mapping) else None
        if base is None and isinstance(guidance, str):
            base = cls.for_guidance(guidance)
        return config_io.from_dict(cls, values, source=source, base=base)

    @classmethod
    def from_yaml(cls, text: str, *, source: str = "config", guidance: str | None = None) -> Config:
        """Read a tree from YAML text; as from_dict."""
        return cls.from_dict(config_io.parse_yaml(text, source=source), source=source, guidance=guidance)

    @classmethod
    def load(cls, path: str | Path, *, guidance: str | None = None, base: Config | None = None) -> Config:
        """Read a tree from a YAML file; as from_dict, and UserError where the file cannot be read."""
        return cls.from_dict(config_io.load_yaml(path), source=str(path), guidance=guidance, base=base)
