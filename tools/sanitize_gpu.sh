#!/usr/bin/env bash
# NVIDIA's compute-sanitizer over tests of the kernels: bad memory accesses everywhere, races where shared memory is used
# (the fused MLP alone). Usage: tools/sanitize_gpu.sh [summary file]    Needs a GPU and the CUDA toolkit; takes minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
summary=${1:-/dev/stdout}
python=${PYTHON:-python}

check() { # TOOL PYTEST-ARGUMENTS...
  local tool=$1 log
  shift
  log=$(mktemp)
  compute-sanitizer --tool "$tool" --error-exitcode 3 --target-processes all \
    "$python" -m pytest -q -p no:cacheprovider -m gpu "$@" > "$log" 2>&1 || { tail -40 "$log"; return 1; }
  { echo "$tool: $*"; grep -E "passed" "$log" | tail -1; grep -E "ERROR SUMMARY|RACECHECK SUMMARY" "$log" | tail -1; } >> "$summary"
  rm "$log"
}

check memcheck tests/ops/test_stream.py tests/ops/test_march.py tests/ops/test_composite.py
check memcheck tests/ops/test_hash_grid_tile.py -k "1023 or 113"
check memcheck tests/rendering/test_streaming_gpu.py -k "precision or everything_runs or tile"
check racecheck tests/ops/test_mlp.py -k "opcheck or passes_match and width=16"
