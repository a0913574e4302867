#!/usr/bin/env bash
# Compiles every csrc/cuda/*.cu for all supported GPU architectures, as a check on machines without a GPU.
# Usage: tools/compile_cuda.sh [BUILD_FOLDER]
# It needs nvcc, CMake, Ninja and pybind11 (the `test` extra brings the last three). Nothing is installed.
#
# The sources have two branches, below compute capability 9.0 and from there on. Each is compiled to PTX once, by the
# lowest architecture that takes it, and that PTX to machine code for all others: half the time of seven front ends.
# DREAMFUSION_FAST_ARCHS="80 90" compiles as an installation for these does.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$(mktemp -d)}
[ $# -gt 0 ] || trap 'rm -rf "$build"' EXIT
python=${PYTHON:-python}
archs=${DREAMFUSION_FAST_ARCHS:-75-real} flags=""
if [ -z "${DREAMFUSION_FAST_ARCHS:-}" ]; then
  flags="-gencode arch=compute_75,code=[sm_80,sm_86,sm_89] -gencode arch=compute_90,code=[sm_90,sm_100,sm_120]"
fi
cmake -G Ninja -S "$root" -B "$build" -DPython_EXECUTABLE="$(command -v "$python")" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DDREAMFUSION_FAST_CUDA=1 \
  -DDREAMFUSION_FAST_ARCHS="$archs" -DCMAKE_CUDA_FLAGS="$flags"
cmake --build "$build" --target _core_cuda
