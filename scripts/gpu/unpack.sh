#!/usr/bin/env bash
# Unpack the bundle on the GPU machine.   usage: unpack.sh [BUNDLE [DEST]]      (default .gpu and /tmp/specopt-gpu)
# Then: . DEST/env.sh
set -euo pipefail
bundle=${1:-${SPECOPT_BUNDLE:-$(dirname "$0")/../../.gpu}}
dest=${2:-${SPECOPT_UNPACKED:-/tmp/specopt-gpu}}
python=${PYTHON:-python3}
mkdir -p "$dest"
dest=$(cd "$dest" && pwd)
extract() {
  if command -v xz > /dev/null; then xz -dc "$1" | tar x -C "$dest"; else
    "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="fully_trusted")' "$1" "$dest"
  fi
}
parts=()
for archive in "$bundle"/{python,native,triton}.tar.xz; do
  [ ! -f "$archive" ] || { extract "$archive" & parts+=($!); }
done
for part in "${parts[@]}"; do wait "$part"; done
# Entries of a Triton cache name the folder they are in.
if [ -d "$dest/triton" ] && [ "$dest" != /tmp/specopt-gpu ]; then
  find "$dest/triton" -name '__grp__*' -exec sed -i "s|/tmp/specopt-gpu/triton|$dest/triton|g" {} +
fi
cat > "$dest/env.sh" <<V
export PYTHONPATH="$dest/site:$dest/deps\${PYTHONPATH:+:\$PYTHONPATH}" TRITON_CACHE_DIR="$dest/triton"
export TRITON_DISABLE_LINE_INFO=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_WORKER_MULTIPROCESSING_METHOD=spawn
V
. "$dest/env.sh"
# vLLM does not start without its operators: where they do not load, a stand-in in Python takes their place.
check() {
  local module=$1 file=$2 stand_in=$3
  if "$python" -c "import torch; import importlib.util as u; s = u.spec_from_file_location('$module', '$file'); \
s.loader.exec_module(u.module_from_spec(s))" 2> "$dest/$module.log"; then echo "$module: loaded"; return; fi
  echo "$module: NOT loaded ($(tail -n 1 "$dest/$module.log" | cut -c 1-160)); its stand-in in Python is used"
  mv "$file" "$dest/$module.so.unused"
  cp "$dest/fallback/$stand_in" "$(dirname "$file")/"
  cp "$dest/fallback/schemas.txt" "$dest/site/vllm/_C_schemas.txt"
  echo 'export SPECOPT_PLAIN_LAYERS=1' >> "$dest/env.sh"
}
check _C_stable_libtorch "$dest/site/vllm/_C_stable_libtorch.abi3.so" _C_stable_libtorch.py &
first=$!
check _vllm_fa3_C "$dest/site/vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so" _vllm_fa3_C.py &
second=$!
# Bytecode by all cores at once, else the first import does it alone.
"$python" -m compileall -q -j 0 "$dest/site/vllm" "$dest/deps" > /dev/null 2>&1 || true
wait "$first" "$second"
