"""Compile the kernels' variants at V = 151,936 for one architecture; print a JSON line for each.

Usage: compile_kernels.py ARCHITECTURE [all], where ARCHITECTURE is 80, 90 or 100. Needs no GPU: Triton brings ptxas.
Without `all`, the sigmoid method's variants are compiled on 90 only, for bf16, runner V2 and no filters: they take most
of the time.
"""

import itertools
import json
import sys

import triton

from vllm_specopt.benchmarks.kernels.compiling import compile_kernel
from vllm_specopt.kernels import arguments, calibrated, emission, exact, filters, row_statistics, token_output

VOCAB_SIZE = 151936
BY_SCORES = ("sigmoid", "mixed", "calibrated")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
COMMON = {
    **{name: "*fp32" for name in ("tile_max_ptr", "tile_sum_ptr", "candidate_score_ptr")},
    **{name: "*i32" for name in ("cu_num_logits_ptr", "tile_argmax_ptr", "num_accepted_ptr", "candidate_token_ptr")},
    **{name: "*i32" for name in ("num_sampled_ptr",)},
    **{name: "i32" for name in ("logits_stride", "draft_logits_stride_0", "draft_logits_stride_1", "vocab_size")},
    **{name: "i32" for name in ("draft_probs_stride", "num_tiles", "rows_per_req", "width", "token_ids_stride")},
    "bad_row_counter_ptr": "*i64",
    "counters_ptr": "*i64",
}
ALIGNED = ("logits_stride", "draft_logits_stride_0", "draft_logits_stride_1", "draft_probs_stride", "vocab_size")


def variants(with_all_sigmoid: bool, architecture: int):
    """Yield (variant name, argument types, launches) for the combinations that serving can produce."""
    padded_tiles = triton.next_power_of_2(triton.cdiv(VOCAB_SIZE, exact.TILE))
    greedy_below = {"GREEDY_BELOW": exact.GREEDY_BELOW}
    for dtype, runner, draft, filtered, method in itertools.product(
        DTYPES, ("v1", "v2"), ("one-hot", "probs", "logits"), (False, True), ("exact", "greedy", *BY_SCORES)
    ):
        greedy = method == "greedy"
        if (greedy and (filtered or draft != "one-hot")) or draft == ("logits" if runner == "v1" else "probs"):
            continue
        serves_most = (dtype, runner, filtered, architecture) == ("bf16", "v2", False, 90)
        if method in BY_SCORES and not (with_all_sigmoid or serves_most):
            continue
        types = dict(COMMON, logits_ptr="*" + dtype)
        types["draft_token_ids_ptr"] = "*i32"
        types["token_ids_ptr"] = "*i32" if runner == "v1" else "*i64"
        if runner == "v2":
            types["state_indices_ptr"] = "*i64"
        if not greedy:
            types.update(temperature_ptr="*fp32", seeds_ptr="*i64", positions_ptr="*i64")
        if draft == "probs":
            types["draft_probs_ptr"] = "*fp32"
        if draft == "logits":
            types.update(draft_logits_ptr="*" + dtype, draft_tile_max_ptr="*fp32", draft_tile_sum_ptr="*fp32")
        if method in BY_SCORES:
            types.update(sigmoid_ptr="*fp32")
        if method == "calibrated":
            types.update(row_shift_ptr="*fp32", blocks_ptr="*i32", num_blocks="i32")
        if method in ("mixed", "calibrated"):
            types.update(sigmoid_requests_ptr="*i1")
        if draft != "one-hot" or "sigmoid_ptr" in types:
            types.update(target_score_ptr="*fp32", target_token_ptr="*i32")
        compact, tiles = {"COMPACT_DRAFTS": runner == "v1"}, {"PADDED_TILES": padded_tiles}
        if filtered:
            types.update(top_k_ptr="*i32", top_p_ptr="*fp32", min_p_ptr="*fp32", threshold_ptr="*fp32")
        launches = [
            (row_statistics.row_statistics_kernel, greedy_below | {"TILE": exact.TILE}, exact.NUM_WARPS),
            (
                emission.emission_kernel,
                greedy_below | compact | tiles | {"TILE": exact.TILE, "BLOCK_K": exact.BLOCK_K},
                exact.NUM_WARPS,
            ),
            (token_output.token_output_kernel, compact | tiles | {"PADDED_WIDTH": exact.BLOCK_K}, 1),
        ]
        if filtered:
            digits = filters.RADIX_DIGITS[DTYPES[dtype]]
            constants = greedy_below | tiles | {"DIGITS": digits, "BLOCK": exact.FILTER_BLOCK}
            launches.append((filters.filter_threshold_kernel, constants, exact.FILTER_NUM_WARPS))
        if method == "calibrated":
            judging = greedy_below | compact
            blocks = {"BLOCK": 64, "STEP": exact.BLOCKS_STEP}
            launches += [
                (calibrated.row_shift_kernel, judging | blocks, exact.NUM_WARPS),
                (
                    calibrated.emitting_row_kernel,
                    judging | {"TILE": exact.TILE, "BLOCK_K": exact.BLOCK_K},
                    exact.NUM_WARPS,
                ),
            ]
        name = "-".join(filter(None, [dtype, runner, draft, "filtered" if filtered else "", method]))
        yield name, types, launches


def main() -> None:
    architecture = int(sys.argv[1])
    seen = set()
    for variant, types, launches in variants(sys.argv[2:] == ["all"], architecture):
        for kernel, constants, num_warps in launches:
            used = {name: types.get(name) for name in kernel.arg_names if name not in constants}
            key = (kernel.__name__, tuple(sorted(used.items(), key=str)), tuple(constants.items()))
            if key in seen:
                continue
            seen.add(key)
            aligned = {name for name in used if name in ALIGNED or name.endswith("_ptr")} - set(arguments.UNALIGNED)
            compiled = compile_kernel(kernel, types, constants, num_warps, architecture, aligned)
            result = {
                "kernel": compiled.name,
                "variant": variant,
                "registers": compiled.registers,
                "spilled_bytes": compiled.spilled,
                "cubin_bytes": len(compiled.cubin),
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
