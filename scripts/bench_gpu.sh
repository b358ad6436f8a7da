#!/usr/bin/env bash
# The benchmarks on a GPU, into benchmarks/results/<device>.json, part by part: what was measured
# stays if a later part is cut off. Usage: bench_gpu.sh [ARGUMENT OF bench_ops.py]...
#
#   PY=python3     the interpreter, with a CUDA build of torch; the step needs torchvision
#   OUT=benchmarks/results   where results go
#   PARTS="losses quant foreach step"   what is run
#   HQOD_COMMIT    the commit to name, where there is no .git
#
# It takes the libraries in hqod_ops/lib as they are, installs nothing and needs no network.
set -uo pipefail
cd "$(dirname "$0")/.."
py=${PY:-python3}
out=${OUT:-benchmarks/results}
parts=${PARTS:-losses quant foreach step}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
HQOD_COMMIT=$(scripts/commit.sh)
export HQOD_COMMIT

name=$(PYTHONPATH="benchmarks:$PYTHONPATH" "$py" -c '
import sys, torch
if not torch.cuda.is_available():
    sys.exit("error: torch finds no CUDA device")
from bench import machine
print(machine.file_name(machine.describe("cuda")).removesuffix(".json"))
') || exit 1
failed=0
summary=()

# run_part NAME COMMAND...
run_part() {
  local part=$1 start=$SECONDS status=0
  shift
  echo "== $part"
  "$@" || status=$?
  [ "$status" = 0 ] || failed=1
  summary+=("$part: status $status after $((SECONDS - start)) s")
}

ops=("$py" benchmarks/bench_ops.py --device cuda --update --output "$out/$name.json")
for part in $parts; do
  case $part in
    losses) run_part losses "${ops[@]}" --filter '_loss|aligned_box_iou' "${@}" ;;
    quant) run_part quant "${ops[@]}" --filter '^(fake_quant|overhead)/' "${@}" ;;
    foreach) run_part foreach "${ops[@]}" --filter '^fake_quant_foreach/' "${@}" ;;
    step) run_part step "$py" benchmarks/bench_step.py --device cuda --output "$out/$name-step.json" ;;
    *)
      echo "error: PARTS: expected losses, quant, foreach or step, got '$part'" >&2
      exit 2
      ;;
  esac
done

echo "== summary"
printf '%s\n' "$out/$name.json at $HQOD_COMMIT" "${summary[@]}"
exit $failed
