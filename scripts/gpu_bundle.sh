#!/usr/bin/env bash
# Pack a trimmed vLLM 0.33.0 for a GPU host that reaches no network and already has Python 3.12, torch 2.11 (CUDA 13),
# Triton 3.6 and transformers 5: vLLM's Python code, its stable-ABI operators, FlashAttention 3 (Hopper) and the pure
# Python packages such a host lacks (gpu_bundle_packages.txt). What it leaves out: other attention and MoE kernels.
#   usage: scripts/gpu_bundle.sh OUT [MB]    needs pip, unzip and xz here; writes OUT/00, OUT/01, ... of at most MB
#                                            (default 48) each, to be brought over one by one
#   there: bash OUT/00/unpack.sh DEST OUT/00 OUT/01 ...    then: source DEST/env.sh
set -euo pipefail
out=${1:?usage: scripts/gpu_bundle.sh OUT [MB]}
limit=${2:-48}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

platforms=()
for glibc in 2_28 2_27 2_26 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
for old in manylinux2014_x86_64 manylinux1_x86_64 any; do platforms+=(--platform "$old"); done
fetch() {
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --abi cp312 --abi abi3 --abi none "${platforms[@]}" --dest "$@"
}

fetch "$scratch/vllm" vllm==0.33.0
mkdir -p "$scratch/pack/wheels"
while read -r requirement; do
  fetch "$scratch/pack/wheels" "$requirement" || echo "left out, no wheel found: $requirement" >&2
done < "$here/gpu_bundle_packages.txt"
(cd "$scratch/vllm" && unzip -q vllm-0.33.0-*.whl)
operators=(_C_stable_libtorch cumem_allocator spinloop fs_io_C vllm_flash_attn/_vllm_fa3_C)
operators=("${operators[@]/#/vllm/}")
(
  cd "$scratch/vllm"
  tar c --exclude='*.so' --exclude='*.h' --exclude='*.hpp' --exclude='*.cuh' --exclude=vllm/vllm-rs \
    vllm vllm-0.33.0.dist-info
) | xz -T0 -6 > "$scratch/pack/python.tar.xz"
(cd "$scratch/vllm" && tar c "${operators[@]/%/.abi3.so}") | xz -T0 -6 > "$scratch/pack/operators.tar.xz"

# One stream, cut where a piece is full.
mkdir -p "$out"
tar c -C "$scratch/pack" . | split --numeric-suffixes --bytes="${limit}M" - "$scratch/piece."
for piece in "$scratch"/piece.*; do
  number=${piece##*.}
  mkdir -p "$out/$number"
  mv "$piece" "$out/$number/piece"
done
cat > "$out/00/unpack.sh" <<'S'
#!/usr/bin/env bash
# usage: unpack.sh DEST PIECE...    the folders of all pieces, in their order
set -euo pipefail
dest=${1:?usage: unpack.sh DEST PIECE...}
shift
mkdir -p "$dest/site" "$dest/pack"
dest=$(cd "$dest" && pwd)
for folder in "$@"; do cat "$folder/piece"; done | tar x -C "$dest/pack"
for archive in python operators; do xz -dc "$dest/pack/$archive.tar.xz" | tar x -C "$dest/site"; done
python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$dest/deps" \
  "$dest"/pack/wheels/*.whl
rm -r "$dest/pack"
cat > "$dest/env.sh" <<V
export PYTHONPATH="$dest/site:$dest/deps\${PYTHONPATH:+:\$PYTHONPATH}"
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_WORKER_MULTIPROCESSING_METHOD=spawn
V
echo "source $dest/env.sh"
S
du -sh "$out"/*
