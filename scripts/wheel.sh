#!/usr/bin/env bash
# Makes dist/: the source archive, and of it one wheel for every Linux x86-64 of glibc 2.28 or newer
# and every Python 3 from 3.10 on. HQOD_CUDA=1 (or 0) says whether the CUDA library must be in it.
set -euo pipefail
platform=manylinux_2_28_$(uname -m)
export HQOD_WHEEL_PLATFORM=$platform

rm -rf dist build/wheel
python -m build --no-isolation --skip-dependency-check --sdist --outdir dist
python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel dist/*.tar.gz
# Torch is in the process before the libraries are; nothing else is of the environment.
python -m auditwheel repair --plat "$platform" --only-plat --exclude 'libtorch*' --exclude 'libc10*' \
  --wheel-dir dist build/wheel/*.whl
ls -l dist
