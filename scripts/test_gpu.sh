#!/usr/bin/env bash
# Everything that a GPU can be asked: the op tests on it, what only a GPU shows, compute-sanitizer.
# Usage: test_gpu.sh [PYTEST ARGUMENT]...
#
#   PY=python3     the interpreter, with a CUDA build of torch, NumPy and pytest; hypothesis too
#                  runs the generated cases
#   OUT=runs/gpu   where reports go: a log of each step, JUnit XML, summary.txt
#   STEPS="suite cuda sanitizer"   what is run
#   HQOD_COMMIT    the commit to name, where there is no .git
#
# It takes the libraries in hqod_ops/lib as they are, installs nothing and needs no network. It goes
# on after a failure, ends with a summary, and fails if a step did.
set -uo pipefail
cd "$(dirname "$0")/.."
py=${PY:-python3}
out=${OUT:-runs/gpu}
steps=${STEPS:-suite cuda sanitizer}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PY=$py PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
HQOD_COMMIT=$(scripts/commit.sh)
export HQOD_COMMIT

# The op tests; each runs where HQOD_TEST_DEVICE says.
suite=(python_tests/ops/test_{contract,losses,fake_quant,activation,foreach,formulas,properties}.py
  python_tests/ops/test_{autograd,compile,bad_input}.py)
failed=0
summary=()
rm -f "$out"/{suite,cuda,sanitizer,summary}.{txt,xml}

{
  echo "machine: $(uname -srm), $(nproc) cores"
  nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader 2>&1 |
    sed 's/^/gpu: /'
  echo "commit: $HQOD_COMMIT"
  sha256sum hqod_ops/lib/*.so
  "$py" -c '
import sys, torch
print("python:", sys.version.split()[0])
print("torch:", torch.__version__, "for CUDA", torch.version.cuda)
import hqod_ops
for name, value in hqod_ops.build_info().items():
    print(f"{name}: {value}")
'
} 2>&1 | tee "$out/summary.txt"

# run_step NAME COMMAND...
run_step() {
  local name=$1 start=$SECONDS status
  shift
  echo "== $name"
  "$@" 2>&1 | tee "$out/$name.txt"
  status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || failed=1
  local last
  last=$(grep -E '^(=+ )?[0-9]+ (passed|failed|error)|^(error|ERROR)' "$out/$name.txt" | tail -n 1)
  summary+=("$name: status $status after $((SECONDS - start)) s${last:+, $last}")
}

for step in $steps; do
  case $step in
    suite)
      run_step suite env HQOD_TEST_DEVICE=cuda HQOD_REQUIRE=ext,cuda "$py" -m pytest -q \
        -p no:cacheprovider --junitxml="$out/suite.xml" --durations=10 \
        "${suite[@]}" "$@"
      ;;
    cuda)
      run_step cuda env HQOD_REQUIRE=ext,cuda "$py" -m pytest -q -p no:cacheprovider \
        --junitxml="$out/cuda.xml" --durations=10 python_tests/cuda "$@"
      ;;
    sanitizer) run_step sanitizer scripts/sanitize_gpu.sh ;;
    *)
      echo "error: STEPS: expected suite, cuda or sanitizer, got '$step'" >&2
      exit 2
      ;;
  esac
done

{
  printf '%s\n' "${summary[@]}"
  [ ! -f "$out/sanitizer.txt" ] || sed -n '/^== compute-sanitizer$/,$p' "$out/sanitizer.txt"
} >> "$out/summary.txt"
echo "== summary"
cat "$out/summary.txt"
exit $failed
