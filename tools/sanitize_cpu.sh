#!/usr/bin/env bash
# Runs tests of the ops with a CPU core under AddressSanitizer and UndefinedBehaviorSanitizer.
# Usage: tools/sanitize_cpu.sh [PYTEST ARGUMENTS]      (by default a selection of one to two minutes)
# It needs GCC or Clang, and what the `test` extra brings. Nothing is installed and nothing in the source tree changes.
#
# The first finding of either ends the run with its report and a failure. Torch and Python are not instrumented: of
# them, only allocations and what the C library copies are watched.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
python=${PYTHON:-python}
compiler=${CXX:-c++}

flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1"
cmake -G Ninja -S "$root" -B "$build/cmake" -DPython_EXECUTABLE="$(command -v "$python")" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DDREAMFUSION_FAST_CUDA=0 -DCMAKE_CXX_COMPILER="$compiler" \
  -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS="$flags" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$build/modules"
cmake --build "$build/cmake" --target _core

# The package as it is, but for the core.
cp -R "$root/dreamfusion_fast" "$root/tests" "$root/pyproject.toml" "$build"
rm -f "$build"/dreamfusion_fast/_core*
cp "$build"/modules/_core.* "$build/dreamfusion_fast"

cd "$build"
# The runtime has to come before all others, since Python brings none, and libstdc++ beside it, which it asks for what
# throws when it starts. What Python and torch never free is not ours.
runtime=$("$compiler" -print-file-name=libasan.so)
[ -e "$runtime" ] || runtime=$("$compiler" -print-file-name="libclang_rt.asan-$(uname -m).so")
preload="$runtime $("$compiler" -print-file-name=libstdc++.so.6)"
run() {
  env LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$build" \
    OMP_WAIT_POLICY=PASSIVE PYTHONDONTWRITEBYTECODE=1 "$python" "$@"
}
run -c 'import dreamfusion_fast._core as core, sys
assert core.__file__.startswith(sys.argv[1]), core.__file__
assert "libasan" in open("/proc/self/maps").read()' "$build"
[ $# -gt 0 ] || set -- tests/robustness/test_ops.py tests/ops/test_march_cascades.py tests/ops/tiles tests/networks/test_dense.py \
  -k "valid or hostile or cascades or march_tile or ray_sums or dense"
run -m pytest -q -p no:cacheprovider -m "" "$@" # those marked slow, too
