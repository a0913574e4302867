"""The package as built: what imports, what it says of itself, and what the build says when something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dreamfusion_fast
from dreamfusion_fast.ops import _native

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


def test_cpu_core_was_built() -> None:
    assert _native.cpu_reason() == ""
    assert _native.cpu_available()


def test_cuda_core_tells_why_not() -> None:
    assert _native.cuda_available() == (_native.cuda_reason() == "")
    if not torch.cuda.is_available():
        assert not _native.cuda_available()


@pytest.mark.gpu
def test_cuda_core_was_compiled_for_something() -> None:
    assert _native.cuda_architectures()


def test_import_is_quick() -> None:
    """The package alone loads neither torch nor the core: `dreamfusion-fast --help` must not take seconds."""
    done = run(sys.executable, "-c", "import sys, dreamfusion_fast; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_public_names_are_there() -> None:
    for name in dreamfusion_fast.__all__:
        assert getattr(dreamfusion_fast, name) is not None
        assert name in dir(dreamfusion_fast)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dreamfusion_fast.nothing


def test_missing_core_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_load", lambda name: (None, f"No module named {name}"))
    _native.function_of.cache_clear()
    assert not _native.cpu_available()
    assert not _native.cuda_available()
    with pytest.raises(RuntimeError, match=r"march_count: the CPU core was not built .* pip install \."):
        _native.call("march_count", torch.zeros(1))


def test_other_devices_and_dtypes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="no native core for device meta"):
        _native.call("march_count", torch.zeros(1, device="meta"))
    with pytest.raises(TypeError, match=r"no code for torch\.float16"):
        _native.call("march_count", torch.zeros(1, dtype=torch.float16))


def test_wrong_switches_are_named() -> None:
    done = run(sys.executable, "setup.py", "build_ext", DREAMFUSION_FAST_CUDA="maybe")
    assert done.returncode != 0
    assert "DREAMFUSION_FAST_CUDA=maybe: expected one of auto, 0, 1, or unset." in done.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DREAMFUSION_FAST_CUDA": "1", "CUDACXX": "no-such-nvcc"}, "asks for the CUDA core, but nvcc was not found"),
        ({"DREAMFUSION_FAST_CUDA": "0", "CXX": "no-such-compiler"}, "no C++ compiler was found"),
    ],
)
def test_missing_compilers_are_named(environment: dict[str, str], message: str, tmp_path: Path) -> None:
    arguments = ("build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    done = run(sys.executable, "setup.py", *arguments, **environment)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "lib").exists()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc: there is none on the path")
def test_unknown_architecture_is_named(tmp_path: Path) -> None:
    arguments = ("build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    environment = {"DREAMFUSION_FAST_CUDA": "1", "DREAMFUSION_FAST_ARCHS": "80;31"}
    done = run(sys.executable, "setup.py", *arguments, **environment)
    assert done.returncode != 0
    assert "cannot compile for compute capability 31" in " ".join(done.stderr.split())
