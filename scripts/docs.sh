#!/usr/bin/env bash
# Builds the site from docs/ into build/docs. A warning is an error: a link inside the site that leads
# nowhere, a name of ours that has no page, a docstring that is not read as it is meant.
set -euo pipefail
rm -rf build/docs
python -m sphinx --builder html --nitpicky --fail-on-warning --keep-going --quiet \
  --doctree-dir build/doctrees docs build/docs
echo "build/docs/index.html"
