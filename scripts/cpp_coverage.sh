#!/usr/bin/env bash
# Builds the native library with gcov's counters, beside the ordinary one, runs the op tests with it
# and lists the lines of csrc/math that none of them reached. Usage: cpp_coverage.sh [PYTEST ARGUMENT]...
set -euo pipefail
root=$PWD
tree=build/coverage/tree

# A copy of the package to put the library into, so that the ordinary build stays as it is.
mkdir -p "$tree"
tar --create --exclude='*.so' --exclude=__pycache__ \
  hqod_ops python_tests benchmarks pyproject.toml | tar --extract --directory "$tree"
cmake -S . -B build/coverage/cmake -G Ninja -DHQOD_HOST=OFF -DHQOD_CUDA=OFF \
  -DCMAKE_CXX_FLAGS=--coverage -DCMAKE_SHARED_LINKER_FLAGS=--coverage \
  -DHQOD_OUTPUT="$root/$tree/hqod_ops" -DPython_EXECUTABLE="$(command -v python)"
cmake --build build/coverage/cmake
find build/coverage/cmake -name '*.gcda' -delete

(cd "$tree" && HQOD_REQUIRE=ext python -m pytest -q python_tests/ops "$@")
python scripts/cpp_coverage.py build/coverage/cmake csrc/math
