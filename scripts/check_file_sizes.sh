#!/usr/bin/env bash
# Fails when a file that git tracks, or would, is larger than 1 MiB: data is made or downloaded.
set -euo pipefail
limit=$((1024 * 1024))

large=$(git ls-files -z --cached --others --exclude-standard |
  xargs -0 --no-run-if-empty stat --format '%s %n' 2> /dev/null |
  awk -v limit="$limit" '$1 > limit') || true
if [ -n "$large" ]; then
  echo "error: files larger than $limit bytes:" >&2
  echo "$large" >&2
  exit 1
fi
