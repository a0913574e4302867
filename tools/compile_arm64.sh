#!/usr/bin/env bash
# Compiles the CPU core's sources for 64-bit Arm under Linux, as a check on other machines. Nothing is linked or run.
# Usage: tools/compile_arm64.sh
# It needs g++-aarch64-linux-gnu, which root gets from Debian's packages here, and pybind11 (the `test` extra brings it).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
compiler=aarch64-linux-gnu-g++
python=${PYTHON:-python}

if ! command -v $compiler >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  export DEBIAN_FRONTEND=noninteractive
  { apt-get -qq update && apt-get -qq install --no-install-recommends g++-aarch64-linux-gnu; } >/dev/null 2>&1 || true
fi
if ! command -v $compiler >/dev/null; then
  echo "skipped: there is no $compiler (apt install g++-aarch64-linux-gnu)"
  exit 0
fi

flags=(-std=c++17 -Wall -Wextra -Werror -fvisibility=hidden -fPIC -fno-math-errno -fno-trapping-math
  -I"$root/csrc" -I"$root/csrc/include")
# Code is generated, not only looked at: an instruction that the processor lacks shows there.
find "$root/csrc/cpu" -name '*.cpp' -print0 |
  xargs -0 -n 1 -P "$(nproc)" $compiler "${flags[@]}" -O1 -o /dev/null -c
# With the Python headers of this machine, which differ from Arm's in sizes that no code of ours depends on.
includes=$("$python" -m pybind11 --includes)
# shellcheck disable=SC2086 # one word per folder is meant
if echo '#include <Python.h>' | $compiler $includes -x c++ -fsyntax-only - 2>/dev/null; then
  $compiler "${flags[@]}" $includes -DDFF_BACKEND=cpu -DDFF_MODULE=_core -DDFF_CUDA_REASON='""' \
    -DDFF_CPU_TARGET='"any processor of its kind"' -fsyntax-only "$root/csrc/bindings.cpp"
else
  echo "without the bindings: this machine's Python headers are for its own processor alone"
fi
echo "the sources of the CPU core compile for 64-bit Arm"
