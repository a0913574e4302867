"""Where a diffusers pipeline comes from: a folder or the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance.config import KNOWN_GUIDANCE, GuidanceConfig
from dreamfusion_fast.guidance.models.hub import HubSource
from dreamfusion_fast.guidance.models.pipeline_files import content_hash, is_pickle
from dreamfusion_fast.guidance.models.pipeline_source import EXPECTED, PipelineSource
from dreamfusion_fast.guidance.models.single_file import SingleFileSource
from dreamfusion_fast.guidance.models.single_file_configs import CONFIGS
from dreamfusion_fast.io import user_path

_HUB_ID = r"[A-Za-z0-9_-][\w.-]*/[\w.-]+"


def open_source(config: GuidanceConfig) -> PipelineSource:
    """The pipeline a config names.

    Raises:
        UserError: neither a known name, nor a pipeline folder, nor the form of a hub id; or the hub does not have it.
    """
    hub_ids = KNOWN_GUIDANCE.get(config.name) or (config.name,)
    name = hub_ids[0]
    path = user_path(name, "guidance")
    if path.is_file() and path.suffix == ".safetensors":
        base = None
        if config.base is not None and config.base not in CONFIGS:
            base = open_source(dataclasses.replace(config, name=config.base, base=None))
        return SingleFileSource(path, config, base)
    if config.base is not None:
        raise UserError(f"guidance base {config.base!r} is for a checkpoint in one file, and {config.name!r} is none")
    if path.is_dir():
        return LocalSource(path, config)
    if path.exists():
        why = "which can run code on loading" if is_pickle(path.name) else "but no checkpoint in safetensors"
        raise UserError(f"guidance {config.name!r} is a file, {why}: want one in safetensors, or a folder: {EXPECTED}")
    if re.fullmatch(_HUB_ID, name):
        return HubSource(hub_ids, config)
    if "/" in name or "\\" in name or name.startswith((".", "~")):
        raise UserError(f"guidance {config.name!r}: there is no such folder; {EXPECTED}")
    raise UserError(
        f"unknown guidance {config.name!r}: choose one of {', '.join(KNOWN_GUIDANCE)}, a folder holding a diffusers "
        "pipeline, or a hub id such as owner/name"
    )


class LocalSource(PipelineSource):
    """A pipeline in a folder."""

    def __init__(self, folder: Path, config: GuidanceConfig):
        self._folder = folder
        # Links may lead about the folder, and from a snapshot in the hub's cache to where it keeps contents.
        root = folder.resolve()
        self._roots = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
        super().__init__(config.name, config)

    def _inside(self, path: Path) -> bool:
        return any(path.resolve().is_relative_to(root) for root in self._roots)

    def _file(self, relative: str) -> Path:
        path = self._folder / self._place(relative)
        if not path.is_file():
            raise self.error(f"no diffusers pipeline, it lacks {relative}: {EXPECTED}")
        if not self._inside(path):
            raise self.error(f"{relative} is a link out of the folder, which is not followed")
        return path

    def _files_in(self, component: str) -> list[str]:
        return sorted(path.name for path in (self._folder / self._place(component)).glob("*") if path.is_file())

    def _identity(self, components: list[str]) -> str:
        """See `PipelineSource.identity`: of the contents of all files that may be read, wherever the folder is."""
        digest = hashlib.sha256()
        for component in components:
            for name in self._files_in(component):
                if self._allow_pickle or not is_pickle(name):
                    path = self._file(f"{component}/{name}")
                    digest.update(f"{path.relative_to(self._folder).as_posix()}:{content_hash(path)}\n".encode())
        return digest.hexdigest()


def open_autoencoder(config: GuidanceConfig, tiny: str) -> PipelineSource:
    """The autoencoder that a config names in place of a pipeline's own, as a pipeline of nothing but a vae.

    Args:
        config: its autoencoder is followed.
        tiny: hub id of the one that "tiny" stands for.

    Raises:
        UserError: neither a folder of one, nor the form of a hub id; or the hub does not have it.
    """
    assert config.autoencoder is not None
    name = tiny if config.autoencoder == "tiny" else config.autoencoder
    own = dataclasses.replace(config, name=name, revision=None, variant=None)
    if user_path(name, "guidance autoencoder").is_dir():
        return _LocalAutoencoder(Path(name), own)
    if re.fullmatch(_HUB_ID, name):
        return _HubAutoencoder([name], own)
    raise UserError(
        f"guidance autoencoder {name!r}: want tiny, a folder with the config.json and weights of one, or a hub id"
    )


class _Autoencoder(PipelineSource):
    """Mixed in before a `LocalSource` or a `HubSource`."""

    index_file = "config.json"

    def _read_index(self) -> dict[str, Any]:
        return {"_class_name": "an autoencoder", "vae": ["diffusers", self._json(self.index_file).get("_class_name")]}

    def _place(self, relative: str) -> str:
        return relative.removeprefix("vae").removeprefix("/")


class _LocalAutoencoder(_Autoencoder, LocalSource):
    pass


class _HubAutoencoder(_Autoencoder, HubSource):
    pass
