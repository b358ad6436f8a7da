#!/usr/bin/env bash
# Prints the commit of this tree: HQOD_COMMIT where it is set, else git's description, else what the
# file COMMIT says, for a copy of the tree that came without .git.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "${HQOD_COMMIT:-}" ]; then
  echo "$HQOD_COMMIT"
else
  git describe --always --dirty --abbrev=12 2> /dev/null || cat COMMIT 2> /dev/null || echo unknown
fi
