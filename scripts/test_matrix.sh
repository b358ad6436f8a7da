#!/usr/bin/env bash
# Installs the wheel into empty environments and tries it: every Python with every torch.
# Usage: test_matrix.sh WHEEL "PYTHON..." "TORCH..." [TABLE.md]; a TORCH is pip requirements joined by
# commas, such as torch==2.11.0,torchvision==0.26.0. With torchvision the demo runs too.
set -euo pipefail
wheel=$(realpath "$1")
table=${4:-/dev/null}
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
cp -r python_tests "$home/python_tests"
cp pyproject.toml "$home"
mapfile -t pip < <(env | grep '^PIP_')
row() { printf '| %s | %s | %s | %s | %s | %s |\n' "$@" | tee -a "$table"; }

failed=0
: > "$table"
row Python torch glibc 'install (s)' 'op tests' '`hqod demo --quick`'
row --- --- --- ---: --- ---
for python in $2; do
  command -v "$python" > /dev/null || { echo "no $python here: left out" >&2; continue; }
  for torch in $3; do
    rm -rf "$home/venv"
    "$python" -m venv "$home/venv"
    run=(env -i "HOME=$home" "PATH=$home/venv/bin:/usr/bin:/bin" CXX=false "${pip[@]}")
    "${run[@]}" pip install --quiet --upgrade pip
    "${run[@]}" pip install --quiet ${torch//,/ } numpy pytest pytest-xdist hypothesis
    extra=; [[ $torch != *torchvision* ]] || extra=[detection]
    start=$SECONDS
    "${run[@]}" pip install --quiet "$wheel$extra"
    seconds=$((SECONDS - start))
    cd "$home" # not the source tree
    tests=passed demo=-
    "${run[@]}" HQOD_REQUIRE=ext pytest -q --numprocesses "${JOBS:-1}" python_tests/ops >&2 || { tests=failed; failed=1; }
    if [ -n "$extra" ]; then
      demo=passed
      "${run[@]}" hqod demo --quick --runs "$home/runs" >&2 || { demo=failed; failed=1; }
    fi
    cd "$OLDPWD"
    version() { "${run[@]}" python -c "import $1; print($2)"; }
    row "$(version platform 'platform.python_version()')" "$(version torch torch.__version__)" \
      "$(version platform 'platform.libc_ver()[1]')" "$seconds" "$tests" "$demo"
  done
done
exit $failed
