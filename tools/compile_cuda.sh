#!/usr/bin/env bash
# Compiles every csrc/cuda/*.cu for all supported GPU architectures, as a check on machines without a GPU.
# Usage: tools/compile_cuda.sh [BUILD_FOLDER]
# It needs nvcc, CMake, Ninja and pybind11 (the `test` extra brings the last three). Nothing is installed.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$(mktemp -d)}
[ $# -gt 0 ] || trap 'rm -rf "$build"' EXIT
python=${PYTHON:-python}
cmake -G Ninja -S "$root" -B "$build" -DPython_EXECUTABLE="$(command -v "$python")" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DDREAMFUSION_FAST_CUDA=1 \
  -DDREAMFUSION_FAST_ARCHS="${DREAMFUSION_FAST_ARCHS:-all}"
cmake --build "$build" --target _core_cuda
