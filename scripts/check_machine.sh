#!/usr/bin/env bash
# Says in one line what a machine lacks for the build. Usage: check_machine.sh PYTHON
set -euo pipefail
python=$1

fail() {
  echo "error: $1" >&2
  exit 1
}

command -v "$python" > /dev/null || fail "no interpreter '$python': install Python 3.10 or newer, or name one with PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "'$python' is $("$python" --version 2>&1), expected 3.10 or newer: name another with PYTHON=..."
"$python" -c 'import venv, ensurepip' 2> /dev/null ||
  fail "'$python' cannot make virtual environments: install python3-venv (Debian, Ubuntu) or its like"
header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
[ -f "$header" ] || fail "no $header: install python3-dev (Debian, Ubuntu) or python3-devel (Fedora)"

cxx=${CXX:-c++}
command -v "${cxx%% *}" > /dev/null ||
  fail "no C++ compiler '$cxx': install g++ 11 or newer, or name one with CXX=..."
$cxx -std=c++20 -fsyntax-only -x c++ - <<< '#include <span>' 2> /dev/null ||
  fail "'$cxx' does not compile C++20: install g++ 11 or newer, or name another with CXX=..."
