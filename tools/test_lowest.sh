#!/usr/bin/env bash
# Installs the lowest versions of the requirements that pyproject.toml allows, and runs tests with them.
# Usage: tools/test_lowest.sh [renderer|generate] [PYTEST ARGUMENTS]      (by default both, with tests of their own)
# VENVS=folder keeps the environments there and uses them again. PYTHON says which Python, of which those versions have
# wheels: 3.10 to 3.12.
#
# renderer: what `pip install .` brings. generate: the extra, too.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONPATH

if [ -z "${VENVS:-}" ]; then
  VENVS=$(mktemp -d)
  trap 'rm -rf "$VENVS"' EXIT
fi

lowest() { # EXTRA...: the requirements and those of the extras as constraints, each at its lowest version
  "$1/bin/python" - "${@:2}" <<'EOF'
import re
import sys

from pip._vendor import tomli  # Python 3.10 has none of its own

project = tomli.loads(open("pyproject.toml", encoding="utf-8").read())["project"]
lines = project["dependencies"] + [line for extra in sys.argv[1:] for line in project["optional-dependencies"][extra]]
bounds = dict(re.fullmatch(r"([\w-]+)>=([\w.]+)", line).groups() for line in lines)  # the extra's come last, and count
print("\n".join(f"{name}=={version}" for name, version in bounds.items()))
EOF
}

try() { # NAME "EXTRAS" TESTS...
  local name=$1 extras=$2 venv=$VENVS/$1
  shift 2
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  # shellcheck disable=SC2086 # one word per extra is meant
  lowest "$venv" $extras >"$venv/lowest.txt"
  printf '\n== %s: %s\n' "$name" "$(tr '\n' ' ' <"$venv/lowest.txt")"
  # The lowest are requirements here, since constraints would be those of the build, too.
  DREAMFUSION_FAST_CUDA=0 "$venv/bin/pip" install --quiet -r "$venv/lowest.txt" ".${extras:+[$extras]}" \
    pytest pytest-benchmark hypothesis
  # From a copy, so that the package is the installed one.
  rm -rf "$venv/tree"
  mkdir "$venv/tree"
  cp -R tests benchmarks pyproject.toml "$venv/tree"
  (cd "$venv/tree" && OMP_WAIT_POLICY=PASSIVE "$venv/bin/python" -m pytest -q -m "" "$@") # those marked slow, too
}

wanted=${1:-both}
[ $# -eq 0 ] || shift
case $wanted in
renderer | generate | both) ;;
*) echo "usage: tools/test_lowest.sh [renderer|generate] [PYTEST ARGUMENTS]" >&2 && exit 2 ;;
esac
if [ "$wanted" != generate ]; then
  [ $# -gt 0 ] && tests=("$@") || tests=(tests/ops tests/fields tests/rendering tests/gpu tests/test_requirements.py)
  try renderer "" "${tests[@]}"
fi
if [ "$wanted" != renderer ]; then
  [ $# -gt 0 ] && tests=("$@") || tests=(tests/guidance tests/networks tests/training tests/export tests/robustness
    tests/test_cli.py tests/test_io.py tests/test_settings.py tests/test_end_to_end.py)
  try generate generate "${tests[@]}"
fi
