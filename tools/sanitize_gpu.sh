#!/usr/bin/env bash
# NVIDIA's compute-sanitizer over tests of the kernels: bad memory accesses everywhere, races where shared memory is used
# (the fused MLP alone). Usage: tools/sanitize_gpu.sh [summary file]    Needs a GPU and the CUDA toolkit; takes minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
summary=${1:-/dev/stdout}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

check() { # NAME TOOL PYTEST-ARGUMENTS...: in the background, as most of it is waiting
  local name=$1 tool=$2
  shift 2
  (
    echo "$tool: $*"
    compute-sanitizer --tool "$tool" --error-exitcode 3 --target-processes all \
      "${PYTHON:-python}" -m pytest -q -p no:cacheprovider -m gpu "$@" > "$logs/$name.full" 2>&1
    echo "exit $?"
    grep -E "[0-9]+ passed|[0-9]+ failed" "$logs/$name.full" | tail -1
    grep -E "ERROR SUMMARY|RACECHECK SUMMARY" "$logs/$name.full" | sort | uniq -c
    grep -E "Invalid|Error:|hazard" "$logs/$name.full" | sort | uniq -c | head -5
  ) > "$logs/$name.summary" &
}

check stream memcheck tests/ops/tiles/test_ray_sums_tile.py tests/ops/test_composite.py \
  tests/ops/test_composite_alpha.py tests/ops/test_weights.py
check march memcheck tests/ops/test_march.py tests/ops/test_march_cascades.py -k "113 or 1023 or capacity or jitter"
check marches memcheck tests/ops/test_traverse.py tests/ops/test_march_morton.py -k "113 or 1023 or limit or rows"
check hash memcheck tests/ops/tiles/test_hash_grid_tile.py -k "113"
check planes memcheck tests/ops/tiles/test_triplane_tile.py tests/ops/test_triplane.py -k "113 or 1023"
check render memcheck tests/rendering/volume/test_streaming_gpu.py -k "agrees or half_precision"
check mlp racecheck tests/ops/test_mlp.py -k "opcheck"
wait
cat "$logs"/*.summary > "$summary"
! grep -qE "^exit [1-9]" "$logs"/*.summary
