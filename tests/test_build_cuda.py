"""What the build decides about CUDA, on machines made of fakes: drivers, GPUs, toolkits and package indices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "backend"))

import dreamfusion_fast_build as backend  # noqa: E402 - found where the line above points
from dreamfusion_fast_build import cuda  # noqa: E402

from dreamfusion_fast import driver  # noqa: E402

LIBCUDA = """
int cuDriverGetVersion(int* value) { *value = VERSION; return STATUS; }
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int* count) { *count = 3; return 0; }
int cuDeviceGet(int* device, int index) { *device = 100 + index; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? (device == 101 ? 12 : 8) : (device == 101 ? 0 : 6);
  return 0;
}
"""
SMI = """#!/bin/sh
case "$*" in
  *compute_cap*) printf '9.0\\n12.0\\n9.0\\n' ;;
  *) echo '| NVIDIA-SMI 570.26   Driver Version: 570.26   CUDA Version: 12.8 |' ;;
esac
"""
WANTED = driver.Driver(13000, (90,))


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def hide_libcuda(folder: Path) -> None:
    """The loader takes this for the library, and gives up at its first byte."""
    folder.mkdir(exist_ok=True)
    (folder / "libcuda.so.1").write_text("none")


def asked(libraries: Path, programs: Path) -> str:
    """What `find_driver` says in a process that sees these folders."""
    code = "from dreamfusion_fast.driver import find_driver; print(find_driver())"
    environ = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PATH": str(programs)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Environment variables of a machine without a toolkit, whatever this one has."""
    monkeypatch.setattr(cuda, "toolkit_nvcc", lambda environ: None)
    monkeypatch.setattr(cuda, "pypi_toolkit", lambda: None)
    monkeypatch.setattr(cuda.platform, "system", lambda: "Linux")
    monkeypatch.setattr(cuda.platform, "machine", lambda: "x86_64")
    for name in ("DREAMFUSION_FAST_CUDA", "DREAMFUSION_FAST_ARCHS", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    return {}


def has(monkeypatch: pytest.MonkeyPatch, found: driver.Driver | None) -> None:
    monkeypatch.setattr(cuda.driver, "find_driver", lambda: found)


@pytest.mark.skipif(shutil.which("cc") is None or os.name != "posix", reason="needs a C compiler: there is no cc")
def test_libcuda_is_asked(tmp_path: Path) -> None:
    (tmp_path / "cuda.c").write_text(LIBCUDA)
    for folder, status in (("works", "0"), ("fails", "999")):
        (tmp_path / folder).mkdir()
        target = tmp_path / folder / "libcuda.so.1"
        options = ["-DVERSION=12080", f"-DSTATUS={status}", "-shared", "-fPIC", "-o", str(target)]
        subprocess.run(["cc", *options, str(tmp_path / "cuda.c")], check=True)
    assert asked(tmp_path / "works", tmp_path) == "Driver(cuda=12080, capabilities=(86, 120))"
    assert asked(tmp_path / "fails", tmp_path) == "None"


def test_nvidia_smi_is_asked_where_libcuda_is_not(tmp_path: Path) -> None:
    hide_libcuda(tmp_path)
    program(tmp_path / "nvidia-smi", SMI)
    assert asked(tmp_path, tmp_path) == "Driver(cuda=12080, capabilities=(90, 120))"
    program(tmp_path / "nvidia-smi", "#!/bin/sh\necho it failed\nexit 9\n")
    assert asked(tmp_path, tmp_path) == "None"


def test_machine_without_both_has_no_driver(tmp_path: Path) -> None:
    hide_libcuda(tmp_path)
    assert asked(tmp_path, tmp_path) == "None"


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (None, False),
        (driver.Driver(12090, (90,)), False),
        (driver.Driver(13000, ()), False),
        (driver.Driver(13000, (61,)), False),
        (driver.Driver(13000, (61, 75)), True),
        (driver.Driver(13020, (120,)), True),
        (driver.Driver(14000, (90,)), True),
    ],
)
def test_compiler_is_wanted_by_gpus_that_it_serves(
    bare: dict[str, str], monkeypatch: pytest.MonkeyPatch, found: driver.Driver | None, wanted: bool
) -> None:
    has(monkeypatch, found)
    assert cuda.compiler_wanted(bare) == wanted


@pytest.mark.parametrize("environ", [{"DREAMFUSION_FAST_CUDA": "0"}, {"CUDACXX": "/opt/nvcc"}])
def test_compiler_is_not_wanted_by_those_who_say_so(
    bare: dict[str, str], monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    has(monkeypatch, WANTED)
    assert cuda.compiler_wanted(bare)
    assert not cuda.compiler_wanted(environ)


def test_compiler_is_not_wanted_beside_a_toolkit(bare: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, WANTED)
    monkeypatch.setattr(cuda, "toolkit_nvcc", lambda environ: "/usr/bin/nvcc")
    assert not cuda.compiler_wanted(bare)


@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH"])
def test_toolkit_is_found_where_cmake_looks(tmp_path: Path, variable: str) -> None:
    nvcc = program(tmp_path / "bin" / "nvcc", "#!/bin/sh\n")
    value = {"CUDACXX": nvcc, "PATH": nvcc.parent}.get(variable, tmp_path)
    assert cuda.toolkit_nvcc({variable: str(value)}) == str(nvcc)
    assert cuda.toolkit_nvcc({"CUDACXX": str(tmp_path / "other"), "CUDA_HOME": str(tmp_path)}) is None


def fake_index(folder: Path, requirements: tuple[str, ...]) -> None:
    """Wheels of these names and of the versions that are asked for, with nothing in them."""
    for requirement in requirements:
        name = requirement.split("=")[0].split("<")[0]
        version = requirement.partition("==")[2] or "13.0.9"
        label = f"{name.replace('-', '_')}-{version}"
        with zipfile.ZipFile(folder / f"{label}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{label}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{label}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{label}.dist-info/RECORD", "")


def test_requirements_are_those_that_pip_finds(
    bare: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    has(monkeypatch, WANTED)
    fake_index(tmp_path, cuda.COMPILER[:-1])
    assert cuda.compiler_requirements() == []
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "so only the CPU core is built" in said
    assert "Install the CUDA toolkit and then this again, or" in said
    fake_index(tmp_path, cuda.COMPILER[-1:])
    assert cuda.compiler_requirements() == list(cuda.COMPILER)
    assert capsys.readouterr().err == ""


def test_hooks_ask_for_the_compiler_as_well(bare: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, WANTED)
    monkeypatch.setattr(cuda, "can_be_fetched", lambda requirements: True)
    monkeypatch.setattr(backend, "_setuptools_for_wheel", lambda settings: ["wheels"])
    monkeypatch.setattr(backend, "_setuptools_for_editable", lambda settings: ["editables"])
    assert backend.get_requires_for_build_wheel() == ["wheels", *cuda.COMPILER]
    assert backend.get_requires_for_build_editable({}) == ["editables", *cuda.COMPILER]
    has(monkeypatch, None)
    assert backend.get_requires_for_build_wheel() == ["wheels"]


@pytest.mark.parametrize(
    ("choice", "environ", "found", "plan"),
    [
        ("0", {}, WANTED, cuda.Plan("0", reason="it was built with DREAMFUSION_FAST_CUDA=0")),
        ("AUTO", {}, None, cuda.Plan("0", reason="there was no GPU when it was built")),
        ("AUTO", {}, driver.Driver(13000, ()), cuda.Plan("0", reason="there was no GPU when it was built")),
        ("AUTO", {}, driver.Driver(13000, (80, 90)), cuda.Plan("AUTO", gpus="80;90")),
        ("AUTO", {"DREAMFUSION_FAST_ARCHS": "75"}, None, cuda.Plan("AUTO", archs="75")),
        ("1", {}, None, cuda.Plan("1")),
        ("1", {"DREAMFUSION_FAST_ARCHS": "all"}, WANTED, cuda.Plan("1", archs="all", gpus="90")),
    ],
)
def test_plan_with_a_toolkit(
    bare: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    choice: str,
    environ: dict[str, str],
    found: driver.Driver | None,
    plan: cuda.Plan,
) -> None:
    has(monkeypatch, found)
    monkeypatch.setattr(cuda, "toolkit_nvcc", lambda environ: "/usr/bin/nvcc")
    assert cuda.make_plan(choice, environ) == plan


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (driver.Driver(12080, (90,)), "wants a driver for CUDA 13.0 (580 or newer); this is one for 12.8"),
        (driver.Driver(13000, (70,)), "compiles for compute capability 7.5 and newer"),
        (WANTED, "the compiler on PyPI could not be had"),
    ],
)
def test_plan_without_any_compiler_says_why(
    bare: dict[str, str], monkeypatch: pytest.MonkeyPatch, found: driver.Driver, reason: str
) -> None:
    has(monkeypatch, found)
    plan = cuda.make_plan("AUTO", bare)
    assert plan.cuda == "0"
    assert reason in plan.reason
    assert cuda.make_plan("1", bare).cuda == "1"  # CMake ends the build


def packages(site: Path) -> Path:
    """What PyPI's packages of the compiler leave in a folder of packages, as far as it is looked at."""
    root = site / "nvidia" / "cu13"
    for part in cuda.PARTS:
        program(root / part, "#!/bin/sh\n")
    return root


def test_compiler_of_packages_counts_when_it_is_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = packages(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert cuda.pypi_toolkit() == root
    (root / "nvvm" / "bin" / "cicc").unlink()
    assert cuda.pypi_toolkit() is None


def test_cmake_is_told(tmp_path: Path) -> None:
    """setup.py from end to end, with a CMake that writes down what it is given and fails: then once without CUDA."""
    hide_libcuda(tmp_path / "lib")
    bin_ = tmp_path / "bin"
    program(bin_ / "nvidia-smi", SMI)
    program(bin_ / "ninja", "#!/bin/sh\n")
    cache = tmp_path / "temp" / "cmake" / "CMakeCache.txt"
    note = f'printf "%s\\n" "CUDACXX=$CUDACXX" "$@" >> {tmp_path}/told'
    program(bin_ / "cmake", f"#!/bin/sh\n{note}\necho CMAKE_CXX_COMPILER:=c++ > {cache}\nexit 1\n")
    program(bin_ / "nvcc", "#!/bin/sh\n")
    environ = {**os.environ, "PATH": f"{bin_}:/usr/bin:/bin", "LD_LIBRARY_PATH": str(tmp_path / "lib")}
    for name in ("DREAMFUSION_FAST_CUDA", "DREAMFUSION_FAST_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        environ.pop(name, None)
    arguments = ("build_ext", "--build-lib", str(tmp_path / "out"), "--build-temp", str(tmp_path / "temp"))
    command = [sys.executable, "setup.py", "-q", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    told = (tmp_path / "told").read_text().split("CUDACXX=")[1:]
    assert len(told) == 2, done.stderr
    assert "-DDREAMFUSION_FAST_CUDA=AUTO\n" in told[0]
    assert "-DDREAMFUSION_FAST_GPUS=90;120\n" in told[0]
    assert "-DDREAMFUSION_FAST_CUDA=0\n" in told[1]
    assert "-DDREAMFUSION_FAST_CUDA_REASON=building it failed" in told[1]


def test_compilers_of_packages_reach_cmake(tmp_path: Path) -> None:
    root = packages(tmp_path)
    environ = cuda.Plan("AUTO", toolkit=root).environment({"LIBRARY_PATH": "/opt/lib", "HOME": "/"})
    assert environ == {"CUDACXX": f"{root}/bin/nvcc", "LIBRARY_PATH": f"{root}/lib:/opt/lib", "HOME": "/"}
    assert cuda.Plan("AUTO").environment({"HOME": "/"}) == {"HOME": "/"}
