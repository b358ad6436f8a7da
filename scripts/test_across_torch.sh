#!/usr/bin/env bash
# Runs the op tests under other torches with the library as it stands, built once against one torch.
# Usage: test_across_torch.sh PYTHON TORCH_VERSION... [-- PYTEST ARGUMENT...]
#
# Each torch gets an environment without a compiler step: hqod_ops comes from the source tree. The
# checksum before and after shows that all of them loaded the same file. Another PYTHON than the one
# of the build lacks the pybind11 module, which is of one Python, and takes its NumPy fallback.
set -euo pipefail
python=$1
shift
versions=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  versions+=("$1")
  shift
done
[ $# -eq 0 ] || shift
library=hqod_ops/lib/libhqod_ops.so
checksum=$(sha256sum "$library")
echo "built against torch $(python -c 'import torch; print(torch.__version__)'): $checksum"

for version in "${versions[@]}"; do
  venv=.venv-run-$version-$(basename "$python")
  if [ ! -f "$venv/.installed" ]; then
    started=$SECONDS
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --upgrade pip
    "$venv/bin/python" -m pip install "torch==$version" numpy pytest pytest-xdist hypothesis
    touch "$venv/.installed"
    echo "installed in $((SECONDS - started)) s"
  fi
  started=$SECONDS
  "$venv/bin/python" -c \
    'import platform, torch; print("== Python", platform.python_version(), "torch", torch.__version__)'
  HQOD_REQUIRE=ext "$venv/bin/python" -m pytest --numprocesses "${JOBS:-1}" "$@"
  sha256sum --check --quiet <<< "$checksum"
  echo "the same file in $((SECONDS - started)) s: $checksum"
done
