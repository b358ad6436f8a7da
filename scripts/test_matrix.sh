#!/usr/bin/env bash
# Installs a wheel into empty environments, without a compiler, and tries it there.
# Usage: test_matrix.sh WHEEL TABLE ENVIRONMENT...; the table is Markdown. An environment is an
# interpreter and pip requirements, such as python3.12:torch==2.11.0,torchvision==0.26.0: the op tests
# run (or what TESTS names), and with torchvision `hqod demo --quick`. An interpreter alone, such as
# .venv-run-2.13.0-python3/bin/python:, is used as it is.
set -euo pipefail
wheel=$(realpath "$1") table=$2
shift 2
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
cp -r python_tests pyproject.toml "$home"
mapfile -t pip < <(env | grep '^PIP_')
row() { printf '| %s | %s | %s | %s | %s | %s |\n' "$@" | tee -a "$table"; }

failed=0
: > "$table"
row Python torch glibc 'install of the wheel (s)' 'op tests' '`hqod demo --quick`'
row --- --- --- ---: --- ---
for environment in "$@"; do
  python=${environment%%:*} requirements=${environment#*:}
  bin=$(dirname "$(realpath -s "$python")")
  [ -z "$requirements" ] || bin=$home/venv/bin
  run=(env -i "HOME=$home" "PATH=$bin:/usr/bin:/bin" "${pip[@]}")
  if [ -n "$requirements" ]; then
    rm -rf "$home/venv"
    "$python" -m venv "$home/venv"
    "${run[@]}" pip install --quiet --upgrade pip
    "${run[@]}" pip install --quiet ${requirements//,/ } numpy pytest pytest-xdist hypothesis
  fi
  start=$SECONDS
  "${run[@]}" CXX=false pip install --quiet --no-deps --force-reinstall "$wheel"
  seconds=$((SECONDS - start))
  cd "$home" # not the source tree
  tests=passed demo=-
  "${run[@]}" HQOD_REQUIRE=ext pytest -q --numprocesses "${JOBS:-1}" ${TESTS:-python_tests/ops} >&2 ||
    { tests=failed && failed=1; }
  if [[ $requirements == *torchvision* ]]; then
    demo=passed
    "${run[@]}" pip install --quiet "$wheel[detection]"
    "${run[@]}" hqod demo --quick --runs "$home/runs" >&2 || { demo=failed && failed=1; }
  fi
  cd "$OLDPWD"
  of() { "${run[@]}" python -c "import $1; print($2)"; }
  row "$(of platform 'platform.python_version()')" "$(of torch torch.__version__)" \
    "$(of platform 'platform.libc_ver()[1]')" "$seconds" "$tests" "$demo"
done
exit $failed
