#!/usr/bin/env bash
# The first GPU numbers in one call of at most 9.5 minutes (README.md): bash scripts/gpu/first_run.sh
# In the project's root, the bundle in .gpu; results are at most 8 files in $OUT, the last 60 lines are the summary.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m first_run
