#!/usr/bin/env bash
# The drop-in in whole engines on one large GPU, stock beside it, without a network: `specopt bench-engine` over models of
# two sizes, three vocabularies and two draft lengths. The models are the shipped pair made large (benchmarks/wide_pair.py,
# wide_shape.py), so acceptance and text are those of trained models. Needs vLLM, scipy, typer and rich; where vLLM cannot
# be installed, scripts/gpu_bundle.sh packs one.
#   usage: scripts/gpu_engine.sh [OUT] [SECONDS]    results go to OUT/NAME/ (default reports/gpu-engine); what does not end
#                                                   within SECONDS (default 540) is left out, the small models come first
#   SPECOPT_TINY=1 rehearses it on any machine with the smallest sizes.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-reports/gpu-engine}
deadline=$((SECONDS + ${2:-540}))
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"
failed=0

# NAME ARGUMENTS...
measure() {
  local name=$1 left=$((deadline - SECONDS))
  shift
  if ((left < 30)); then
    echo "$name: left out, no time left"
    return
  fi
  echo "== $name"
  timeout "$left" "$python" -m vllm_specopt.cli.main bench-engine --out "$out/$name" "$@" 2>&1 | tee "$out/$name.log"
  local status=${PIPESTATUS[0]}
  ((status == 0)) || { echo "$name: status $status"; failed=1; }
}

if [ -n "${SPECOPT_TINY:-}" ]; then
  measure tiny --vocab-size 1024 --width 4 --extra-layers 1 --requests 2 --output-len 4 --drafting greedy --repeats 1 \
    --draft-tokens 3
  exit "$failed"
fi

run=(--requests 64 --output-len 128 --repeats 2)
# A kernel of ours that is compiled in flight ends this one.
measure jit-monitor --vocab-size 151936 --width 4 --arm exact --requests 8 --output-len 16 --repeats 1 --jit-monitor error
for tokens in 3 7; do
  for vocab in 151936 128256 262144; do
    measure "1b-v$vocab-k$tokens" --vocab-size "$vocab" --width 4 --extra-layers 20 --draft-tokens "$tokens" "${run[@]}"
  done
done
for tokens in 3 7; do
  measure "9b-v151936-k$tokens" --vocab-size 151936 --width 16 --extra-layers 20 --draft-tokens "$tokens" "${run[@]}"
done
exit "$failed"
