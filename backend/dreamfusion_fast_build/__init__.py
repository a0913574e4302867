"""The build backend: setuptools' own, which also asks for a CUDA compiler where there is a GPU and no toolkit.

The hooks are those of PEP 517 and PEP 660. `cuda.py` decides; setup.py builds.
"""

from __future__ import annotations

from typing import Any

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.build_meta import get_requires_for_build_editable as _setuptools_for_editable
from setuptools.build_meta import get_requires_for_build_wheel as _setuptools_for_wheel

from dreamfusion_fast_build.cuda import compiler_requirements

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What the build needs beside `build-system.requires`."""
    return [*_setuptools_for_wheel(config_settings), *compiler_requirements()]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """The same for an editable install."""
    return [*_setuptools_for_editable(config_settings), *compiler_requirements()]
