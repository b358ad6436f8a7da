#!/usr/bin/env bash
# Runs the op tests under other torches with the library as it stands, built once against one torch.
# Usage: test_across_torch.sh PYTHON TORCH_VERSION...
#
# Each torch gets an environment without a compiler step: hqod_ops comes from the source tree. The
# checksum before and after shows that all of them loaded the same file.
set -euo pipefail
python=$1
shift
library=hqod_ops/lib/libhqod_ops.so
checksum=$(sha256sum "$library")
echo "built against torch $(python -c 'import torch; print(torch.__version__)'): $checksum"

for version in "$@"; do
  venv=.venv-run-$version-$(basename "$python")
  if [ ! -f "$venv/.installed" ]; then
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --upgrade pip
    "$venv/bin/python" -m pip install "torch==$version" numpy pytest pytest-xdist hypothesis
    touch "$venv/.installed"
  fi
  echo "== torch $("$venv/bin/python" -c 'import torch; print(torch.__version__)')"
  HQOD_REQUIRE=ext "$venv/bin/python" -m pytest --numprocesses "${JOBS:-1}"
  sha256sum --check --quiet <<< "$checksum"
  echo "the same file: $checksum"
done
