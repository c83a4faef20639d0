#!/usr/bin/env bash
# Pack vLLM 0.33.0 for the GPU host into one folder that fits one call: its Python code, its operators and
# FlashAttention 3 with the Hopper device code that a bf16 Llama needs, the packages that machine lacks, the counts of
# `make cost` where reports/cost has them, and a Triton cache where TRITON_CACHE names one. Left out: FlashAttention 2, MoE
# operators, DeepGEMM, the Rust front end.
#   usage: make_bundle.sh OUT [VLLM_WHEEL]       needs python3 with pip, unzip, strip and xz; no GPU, no torch
set -euo pipefail
out=${1:?usage: make_bundle.sh OUT [VLLM_WHEEL]}
wheel=${2:-}
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
cache=${TRITON_CACHE:-}
most=$((63 << 20))
stop() { echo "make_bundle: $1" >&2; exit 2; }
for tool in "$python" unzip strip xz; do command -v "$tool" > /dev/null || stop "$tool is not here: install it."; done
"$python" -m pip --version > /dev/null 2>&1 || stop "$python has no pip: name another with PYTHON."
[ -z "$wheel" ] || [ -f "$wheel" ] || stop "$wheel is no file: name a wheel of vLLM 0.33.0, or none."
[ -z "$cache" ] || [ -d "$cache" ] || stop "TRITON_CACHE is $cache, which is no folder."
[ -z "$wheel" ] || wheel=$(realpath "$wheel")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Every tag that glibc 2.39 runs: pip compares them letter by letter.
platforms=()
for minor in 39 38 37 36 35 34 33 32 31 30 29 28 27 26 25 24 17 12 5; do
  platforms+=(--platform "manylinux_2_${minor}_x86_64")
done
for old in manylinux2014_x86_64 manylinux2010_x86_64 manylinux1_x86_64 any; do platforms+=(--platform "$old"); done
fetch() {
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --abi cp312 --abi abi3 --abi none "${platforms[@]}" --dest "$@" 2> >(grep -v 'is ignored' >&2) ||
    stop "pip found no wheel for one of: ${*:2}"
}

mkdir -p "$scratch/wheels" "$scratch/pack/site" "$scratch/pack/deps"
if [ -z "$wheel" ]; then
  fetch "$scratch" vllm==0.33.0
  wheel=$(echo "$scratch"/vllm-0.33.0-*.whl)
fi
mapfile -t wanted < <(grep -v '^ *\(#\|$\)' "$here/packages.txt")
fetch "$scratch/wheels" "${wanted[@]}"   # one that is missing stops here: without it the engine does not start
(cd "$scratch/pack/site" && unzip -q "$wheel" -x '*.h' '*.hpp' '*.cuh' '*.inl' '*.cu' '*.cpp' '*/vllm-rs' \
  'vllm/vllm_flash_attn/*fa2*.so' 'vllm/_flash*.so' 'vllm/_moe_C*.so' 'vllm/_deepselect*.so' 'vllm/_qutlass*.so' \
  'vllm/third_party/deep_gemm/*' 'vllm/third_party/fmha_sm100/*' 'vllm/third_party/tml_fa4/*')
operators=$scratch/pack/site/vllm/_C_stable_libtorch.abi3.so
attention=$scratch/pack/site/vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so
units='^flash_(fwd_combine|prepare_scheduler|fwd_hdim(64|128)_bf16_(packgqa|paged|split|paged_split)_sm90)$'
"$python" "$here/prune_fatbin.py" "$attention" "$attention.pruned" --units "$units" --filler "$operators"
"$python" "$here/prune_fatbin.py" "$operators" "$operators.pruned"
for library in "$operators" "$attention"; do
  mv "$library.pruned" "$library"
  strip -s "$library"
done
for file in "$scratch"/wheels/*.whl; do unzip -q -o "$file" -d "$scratch/pack/deps"; done
find "$scratch/pack/deps" -name '*.so*' -exec strip --strip-unneeded {} + 2>/dev/null || true
# vLLM finds the plugin by its entry point, which needs the project's metadata beside it, not its code.
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/vllm_specopt/__init__.py")
meta=$scratch/pack/deps/vllm_specopt-$version.dist-info
mkdir -p "$meta"
printf 'Metadata-Version: 2.1\nName: vllm-specopt\nVersion: %s\n' "$version" > "$meta/METADATA"
printf '[vllm.general_plugins]\nspecopt = vllm_specopt:register\n' > "$meta/entry_points.txt"
cp -r "$here/fallback" "$scratch/pack/"
# Of a cache entry only the binary and its description are read again.
if [ -n "$cache" ]; then
  mkdir -p "$scratch/pack/triton"
  (cd "$cache" && find . -type f \( -name '*.cubin' -o -name '*.json' -o -name '*.so' \) -print0 | tar c --null -T -) |
    tar x -C "$scratch/pack/triton"
  echo "Triton cache: $(ls "$scratch/pack/triton" | wc -l) entries"
fi

mkdir -p "$out"
pack() { tar c --sort=name --owner=0 --group=0 -C "$scratch/pack" "${@:2}" | xz -T1 "${xz[@]}" > "$out/$1"; }
xz=(--lzma2=preset=9e); pack python.tar.xz --exclude='*.so' --exclude='*.so.*' site deps fallback
xz=(--x86 --lzma2=preset=9e); pack native.tar.xz $(cd "$scratch/pack" && find site deps -name '*.so' -o -name '*.so.*')
[ ! -d "$scratch/pack/triton" ] || { xz=(--lzma2=preset=6); pack triton.tar.xz triton; }
[ ! -f "$root/reports/cost/cost.json" ] || cp "$root/reports/cost/cost.json" "$out/"
tree=$(cd "$root" && git ls-files -z --cached --others --exclude-standard | du -bc --files0-from=- 2> /dev/null | tail -n 1)
total=$(du -bsc "$out"/* | tail -n 1)
total=$((${total%%[^0-9]*} + ${tree%%[^0-9]*}))
du -bs "$out"/* | awk '{printf "%9.2f MiB  %s\n", $1 / 1048576, $2}'
awk -v t="${tree%%[^0-9]*}" -v s="$total" 'BEGIN {printf "%9.2f MiB  the project\n%9.2f MiB  in all\n", t / 1048576, s / 1048576}'
((total <= most)) || stop "bundle and project are larger than 63 MiB together: what one call may carry."
