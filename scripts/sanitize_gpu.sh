#!/usr/bin/env bash
# Runs the tests marked `sanitizer` under compute-sanitizer. Usage: sanitize_gpu.sh [TOOL]...
#
#   TOOL           memcheck, racecheck, initcheck, synccheck; by default all of them
#   PY=python3     the interpreter, with a CUDA build of torch, and pytest
#   LIMIT=900      seconds after which a tool is ended
#
# It goes on after a failure, ends with a line for each tool, and fails if one of them did.
set -uo pipefail
cd "$(dirname "$0")/.."
py=${PY:-python3}
limit=${LIMIT:-900}
tools=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck initcheck synccheck)

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
[ -n "$sanitizer" ] || {
  echo "error: no compute-sanitizer in PATH or /usr/local/cuda/bin: it is part of the CUDA toolkit" >&2
  exit 1
}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

export HQOD_REQUIRE=ext,cuda PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=0
summary=()
for tool in "${tools[@]}"; do
  options=(--tool "$tool" --error-exitcode 86 --print-limit 20)
  caching=()
  case $tool in
    # Errors of API calls are left to the program: torch probes for what a driver may not have.
    memcheck) options+=(--report-api-errors no) ;;&
    # Every tensor an allocation of its own, so that its ends, and its fresh memory, are known.
    memcheck | initcheck) caching=(PYTORCH_NO_CUDA_MEMORY_CACHING=1) ;;
  esac
  echo "== $tool"
  env "${caching[@]}" timeout --kill-after=30 "$limit" "$sanitizer" "${options[@]}" \
    "$py" -m pytest -q -p no:cacheprovider --tb=short -m sanitizer \
    python_tests/cuda/test_sanitizer.py 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  case $status in
    0) word=passed ;;
    86) word="errors found" ;;
    124 | 137) word="ended after $limit s" ;;
    *) word="status $status" ;;
  esac
  # Without its last line the sanitizer never ran: a program that it did not see is no clean one.
  if [ "$status" = 0 ] && ! grep -qE '(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)' "$log"; then
    word="no summary of the sanitizer"
  fi
  [ "$word" = passed ] || failed=1
  summary+=("$tool: $word")
done

echo "== compute-sanitizer"
printf '%s\n' "${summary[@]}"
exit $failed
