#!/usr/bin/env bash
# Fails unless every native library uses torch through its stable ABI alone, from the oldest torch on
# that pyproject.toml admits.
set -euo pipefail
floor=$(sed -nE 's/^dependencies = .*torch>=([0-9.]+).*/\1.0/p' pyproject.toml)

command -v torch-abi-audit > /dev/null || {
  echo "error: no torch-abi-audit, which needs Python 3.11 or newer: choose one with PYTHON=..." >&2
  exit 1
}
for library in hqod_ops/lib/*.so; do
  report=$(torch-abi-audit --verbose "$library")
  echo "$report"
  grep -Eq '^ *Torch ABI: +STABLE$' <<< "$report" && grep -Eq "^ *Min torch: +$floor$" <<< "$report" || {
    echo "error: $library: expected the stable ABI of torch $floor alone" >&2
    exit 1
  }
done
