#!/usr/bin/env bash
# Builds a library whose CPU ops run the CUDA kernels, threads and blocks as loops, beside the ordinary
# one, and runs the op tests with it. Usage: test_emulated.sh [PYTEST ARGUMENT]...
set -euo pipefail
tree=build/emulated/tree

# A copy of the package to put the library into, so that the ordinary build stays as it is.
mkdir -p "$tree"
tar --create --exclude='*.so' --exclude=__pycache__ \
  hqod_ops python_tests benchmarks pyproject.toml | tar --extract --directory "$tree"
cmake -S . -B build/emulated/cmake -G Ninja -DHQOD_EMULATE=ON -DHQOD_CUDA=OFF -DHQOD_HOST=OFF \
  -DHQOD_WERROR="${HQOD_WERROR:-OFF}" -DHQOD_OUTPUT="$PWD/$tree/hqod_ops" \
  -DPython_EXECUTABLE="$(command -v python)"
cmake --build build/emulated/cmake

cd "$tree"
export HQOD_REQUIRE=ext HQOD_EMULATED=1
python -m pytest --numprocesses "${JOBS:-1}" -m numeric "$@"
