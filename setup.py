"""Builds the native core with CMake; everything else about the package is in pyproject.toml.

Read from the environment: DREAMFUSION_FAST_CUDA, DREAMFUSION_FAST_ARCHS, DREAMFUSION_FAST_PORTABLE (CMakeLists.txt says
what they do), CUDA_HOME or CUDACXX for a CUDA toolkit outside the path, CMAKE_BUILD_PARALLEL_LEVEL for the number of
compilers at once, DREAMFUSION_FAST_BUILD for the folder that CMake works in, so that a build for another Python goes on
where one has ended. backend/dreamfusion_fast_build decides what is built for CUDA.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "backend"))

from dreamfusion_fast_build.cuda import Plan, make_plan  # noqa: E402 - found where the line above points

CUDA_CHOICES = {"": "AUTO", "auto": "AUTO", "0": "0", "1": "1"}
SWITCHES = {"": "0", "0": "0", "1": "1"}


def choice(name: str, allowed: dict[str, str]) -> str:
    value = os.environ.get(name, "").strip().lower()
    if value not in allowed:
        raise SystemExit(f"{name}={value}: expected one of {', '.join(key for key in allowed if key)}, or unset.")
    return allowed[value]


class CMakeBuild(build_ext):
    """Configures and compiles all modules in one CMake build, then puts what came of it where setuptools wants it."""

    def build_extensions(self) -> None:
        plan = make_plan(choice("DREAMFUSION_FAST_CUDA", CUDA_CHOICES), os.environ)
        build_dir = Path(os.environ.get("DREAMFUSION_FAST_BUILD") or Path(self.build_temp) / "cmake").resolve()
        if plan.reason:
            print(f"dreamfusion_fast: only the CPU core is built: {plan.reason}", file=sys.stderr)
        try:
            self.run_cmake(build_dir, plan)
        except subprocess.CalledProcessError as error:
            if plan.cuda != "AUTO":
                raise
            # A toolkit that does not fit the compiler or the driver must not cost the user the CPU core. If that
            # does not compile either, the error is no matter of CUDA and ends the build.
            print(f"dreamfusion_fast: the build failed ({error}); trying again without CUDA", file=sys.stderr)
            self.run_cmake(build_dir, Plan("0", reason="building it failed (pip install -v . shows why)"))

        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            built = build_dir / "modules" / target.name
            target.unlink(missing_ok=True)
            if built.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                # Whole or not at all, under a new inode: another process may have the old one loaded.
                temporary = target.with_suffix(f".{os.getpid()}.tmp")
                shutil.copyfile(built, temporary)
                temporary.replace(target)
            elif not extension.optional:
                raise RuntimeError(f"CMake finished but made no {built.name}")

    def copy_extensions_to_source(self) -> None:
        # An editable install after a build without CUDA must not keep the CUDA module of the build before.
        build_py = self.get_finalized_command("build_py")
        for extension in self.extensions:
            in_source, built = self._get_inplace_equivalent(build_py, extension)
            if not os.path.exists(built):
                Path(in_source).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def run_cmake(self, build_dir: Path, plan: Plan) -> None:
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if cmake is None or ninja is None:
            raise SystemExit("dreamfusion_fast: CMake and Ninja are needed to build it: pip install cmake ninja")
        import pybind11

        # The modules must be those of this build, and CMake or nvcc may have lived in a build environment that is gone.
        shutil.rmtree(build_dir / "modules", ignore_errors=True)
        cache = build_dir / "CMakeCache.txt"
        if cache.exists():
            programs = re.findall(r"(?m)^(?:CMAKE_COMMAND|CMAKE_CUDA_COMPILER):\w+=(.+)$", cache.read_text())
            if not all(os.path.exists(program) for program in programs):
                shutil.rmtree(build_dir)
        build_dir.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": build_dir / "modules",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "DREAMFUSION_FAST_CUDA": plan.cuda,
            "DREAMFUSION_FAST_CUDA_REASON": plan.reason,
            "DREAMFUSION_FAST_ARCHS": plan.archs,
            "DREAMFUSION_FAST_GPUS": plan.gpus,
            "DREAMFUSION_FAST_PORTABLE": choice("DREAMFUSION_FAST_PORTABLE", SWITCHES),
        }
        forgotten = ["-UPython_*", "-U_Python_*", "-Upybind11_*"]  # of a Python that this folder was used for before
        arguments = [*forgotten, *(f"-D{name}={value}" for name, value in options.items())]
        environ = plan.environment(os.environ)
        try:
            configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build_dir), *arguments]
            subprocess.run(configure, env=environ, check=True)
            subprocess.run([cmake, "--build", str(build_dir)], env=environ, check=True)
        except subprocess.CalledProcessError:
            log = "\n".join(path.read_text() for path in [build_dir / "CMakeCache.txt"] if path.exists())
            if "CMAKE_CXX_COMPILER:" not in log or "CMAKE_CXX_COMPILER-NOTFOUND" in log:
                raise SystemExit(
                    "dreamfusion_fast: no C++ compiler was found, and its native core has to be compiled.\n"
                    "  Debian, Ubuntu: apt install g++   Fedora: dnf install gcc-c++   macOS: xcode-select --install\n"
                    "  Windows: the Build Tools for Visual Studio, from their developer prompt\n"
                    "  or name one: CXX=/path/to/compiler pip install ."
                ) from None
            raise


setup(
    ext_modules=[
        Extension("dreamfusion_fast._core", sources=[]),
        Extension("dreamfusion_fast._core_avx2", sources=[], optional=True),
        Extension("dreamfusion_fast._core_avx512", sources=[], optional=True),
        Extension("dreamfusion_fast._core_cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
