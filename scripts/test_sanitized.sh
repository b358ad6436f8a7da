#!/usr/bin/env bash
# Builds the native library with AddressSanitizer and UndefinedBehaviorSanitizer, beside the ordinary
# one, and runs the op tests with it. Usage: test_sanitized.sh [PYTEST ARGUMENT]...
set -euo pipefail
tree=build/sanitize/tree
compiler=${CXX:-c++}

# A copy of the package to put the library into, so that the ordinary build stays as it is.
mkdir -p "$tree"
tar --create --exclude='*.so' --exclude=__pycache__ \
  hqod_ops python_tests benchmarks pyproject.toml | tar --extract --directory "$tree"
cmake -S . -B build/sanitize/cmake -G Ninja -DHQOD_SANITIZE=ON -DHQOD_HOST=OFF -DHQOD_CUDA=OFF \
  -DHQOD_OUTPUT="$PWD/$tree/hqod_ops" -DPython_EXECUTABLE="$(command -v python)"
cmake --build build/sanitize/cmake

# Python itself is not sanitized, so the runtimes come first; libstdc++ with them, since they look
# for its exception handling when they start.
preload=()
for runtime in libasan.so libubsan.so libstdc++.so; do
  preload+=("$(readlink -f "$($compiler -print-file-name=$runtime)")")
done

cd "$tree"
# Python leaks by design.
export ASAN_OPTIONS=detect_leaks=0
export UBSAN_OPTIONS=print_stacktrace=1
export HQOD_REQUIRE=ext
sanitized() {
  LD_PRELOAD=$(IFS=:; echo "${preload[*]}") python -m pytest "$@"
}
sanitized python_tests/ops/test_bad_input.py "$@"
sanitized -m numeric "$@"
