#!/usr/bin/env bash
# The GPU's share of the evidence, in under 9 minutes on one large GPU and without a network: the kernel tests, then the
# whole grid of `specopt bench`. Needs PyTorch, Triton, pytest, typer and rich; vLLM for the peers; matplotlib for the
# plots. Nothing has to be installed: it runs from this checkout.
#   usage: scripts/gpu_grid.sh [OUT]     results go to OUT (default reports/gpu); SPECOPT_COMMIT names the commit where
#                                        the checkout carries no git history
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-reports/gpu}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"
status=0
timeout 180 "$python" -m pytest tests/test_triton.py tests/test_filters.py -q -p no:cacheprovider 2>&1 |
  tee "$out/tests.log" || status=$?
# A broken kernel still gets its grid: each case is checked again before it is timed.
timeout 350 "$python" -m vllm_specopt.cli.main bench --suite gpu --device cuda --repeats 40 --minutes 5 --out "$out" 2>&1 |
  tee "$out/bench.log" || status=$?
exit "$status"
