"""The package as built: what imports, what it says of itself, and what the build says when something is missing."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


def core_with(monkeypatch: pytest.MonkeyPatch, *variants: str) -> SimpleNamespace:
    """A CPU core beside which the processor runs these."""
    for name in ("_core_avx2", "_core_avx512"):
        monkeypatch.setitem(sys.modules, f"dreamfusion_fast.{name}", SimpleNamespace(name=name))
    core = SimpleNamespace(name="_core", cpu_variants=lambda: list(variants))
    monkeypatch.setitem(sys.modules, "dreamfusion_fast._core", core)
    return core


@pytest.mark.parametrize(
    ("variants", "asked", "chosen"),
    [
        ((), "", "_core"),
        (("_core_avx2",), "", "_core_avx2"),
        (("_core_avx512", "_core_avx2"), "", "_core_avx512"),
        (("_core_avx512", "_core_avx2"), "avx2", "_core_avx2"),
        (("_core_avx512", "_core_avx2"), "Baseline", "_core"),
    ],
)
def test_best_cpu_core_is_chosen(
    monkeypatch: pytest.MonkeyPatch, variants: tuple[str, ...], asked: str, chosen: str
) -> None:
    monkeypatch.setenv("DREAMFUSION_FAST_CPU", asked)
    assert _native._best_variant(core_with(monkeypatch, *variants)).name == chosen


def test_cpu_core_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMFUSION_FAST_CPU", "avx512")
    core_with(monkeypatch, "_core_avx2")
    assert _native._load.__wrapped__("_core") == (
        None,
        "DREAMFUSION_FAST_CPU=avx512: this build and processor offer baseline, avx2",
    )


def test_cpu_core_says_what_it_was_compiled_for() -> None:
    assert _native.cpu_target() in (
        "the processor it was built on",
        "any processor of its kind",
        "x86-64-v2",
        "AVX2",
        "AVX-512",
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
def test_portable_cores_differ_in_instructions_alone(tmp_path: Path) -> None:
    """Three cores; ops that have to round as their twins do, in each without fused multiplications and additions."""
    pybind11 = pytest.importorskip("pybind11")
    options = {
        "DREAMFUSION_FAST_PORTABLE": "1",
        "DREAMFUSION_FAST_CUDA": "0",
        "CMAKE_EXPORT_COMPILE_COMMANDS": "1",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    arguments = [f"-D{name}={value}" for name, value in options.items()]
    done = run("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path), *arguments)
    assert done.returncode == 0, done.stderr
    commands: dict[str, dict[str, str]] = {}
    for entry in json.loads((tmp_path / "compile_commands.json").read_text()):
        target = re.search(r"CMakeFiles/(\w+)\.dir", entry["command"])
        assert target is not None
        commands.setdefault(target[1], {})[Path(entry["file"]).stem] = entry["command"]
    plain = commands["_core_ops"]
    assert set(plain) == {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    for core, added in (("_core_avx2", {"-mavx2", "-mfma"}), ("_core_avx512", {"-mavx2", "-mfma", "-mavx512f"})):
        for op, command in commands[f"{core}_ops"].items():
            words, others = set(command.split()), set(plain[op].split())
            assert added <= words - others
            assert {word for word in words ^ others if not word.startswith("-m") and core not in word} <= {
                word for word in others if "_core_ops.dir" in word
            }
    exact = {op for op, command in plain.items() if "-ffp-contract=off" in command}
    assert exact == {"ray_box", "occupancy", "march", "march_morton", "traverse"}


def test_the_check_of_the_cuda_sources_compiles_all_that_an_installation_may() -> None:
    """Each branch of the sources, by its lowest architecture, and machine code for each that a wheel is built for."""
    sources = [path.read_text() for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp")]
    conditions = {line for text in sources for line in text.splitlines() if "__CUDA_ARCH__" in line}
    branches = {int(found) // 10 for line in conditions for found in re.findall(r"__CUDA_ARCH__ >= (\d+)", line)}
    assert len(branches) == len(conditions)
    script = (ROOT / "tools" / "compile_cuda.sh").read_text()
    virtual = {int(arch) for arch in re.findall(r"compute_(\d+)", script)}
    machine = {int(arch) for arch in re.findall(r"sm_(\d+)", script)} | {75}
    supported = re.search(r"foreach\(arch ([\d ]+)\)", (ROOT / "cmake" / "cuda.cmake").read_text())
    assert supported is not None
    assert machine == {int(arch) for arch in supported[1].split()}
    assert virtual == {min(machine)} | branches


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
