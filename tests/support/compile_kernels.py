"""Compile the kernels' variants at V = 151,936 for one architecture; print a JSON line for each.

Usage: compile_kernels.py ARCHITECTURE [all], where ARCHITECTURE is 80, 90 or 100. Needs no GPU: Triton brings ptxas.
Without `all`, variants with filters or the sigmoid method are compiled for bf16 and runner V2 only, and runner V1's for
bf16 only: they take most of the time.
"""

import itertools
import json
import re
import sys

import torch

from vllm_specopt.benchmarks.kernels.compiling import compile_kernel
from vllm_specopt.integration.config import WITH_CONSTANTS
from vllm_specopt.kernels import audit, decide, launch, residual, statistics
from vllm_specopt.kernels.shapes import DEFAULTS
from vllm_specopt.kernels.sharded import decide as shard_decide
from vllm_specopt.kernels.sharded import filters, flat, pieces, sweep
from vllm_specopt.kernels.sharded import residual as shard_residual
from vllm_specopt.rules import RULES

VOCAB_SIZE = 151936
BLOCK_K = 8
METHODS = ("sigmoid", "sigmoid-mixed", "block-mixed", "typical-mixed", "budget-mixed")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOATS = ("tile_max_ptr", "tile_sum_ptr", "temperature_ptr")
INTS = ("cu_num_logits_ptr", "draft_token_ids_ptr", "outcome_ptr", "arrived_ptr", "row_arrived_ptr", "num_sampled_ptr")
SCALARS = ("logits_stride", "draft_logits_stride_0", "draft_logits_stride_1", "draft_probs_stride", "vocab_size")
ALIGNED = (*SCALARS, "first", "end", "flat_stride")
SCALARS += ("num_tiles", "num_row_tiles", "rows_per_req", "token_ids_stride", "method")
COMMON = {
    **dict.fromkeys(FLOATS, "*fp32"),
    **dict.fromkeys(INTS, "*i32"),
    **dict.fromkeys(SCALARS, "i32"),
    "shares_ptr": "*fp64",
    **dict.fromkeys(("seeds_ptr", "positions_ptr", "bad_row_counter_ptr", "counters_ptr", "counts_ptr"), "*i64"),
}
# Of a rank among eight: boundaries between them cut tiles.
RANKS = 8
SHARD_INTS = (
    "places_ptr",
    "row_places_ptr",
    "cut_tiles_ptr",
    "part_columns_ptr",
    "part_places_ptr",
    "sent_outcome_ptr",
)
SHARD_FLOATS = ("sent_max_ptr", "sent_sum_ptr", "cut_max_ptr", "cut_sum_ptr", "row_ptr")
SHARD_SCALARS = (
    "first", "columns", "first_tile", "end_tile", "end", "most_whole", "part_width", "num_groups", "num_cut",
    "sent_stride", "sent_outcome_stride", "sent_token_stride", "sent_values_stride", "begun_tile", "flat_width",
    "flat_stride", "end_begun", "sent_logit_stride", "first_row_tile", "end_row_tile", "most_whole_row", "num_cut_row",
)  # fmt: skip
RESIDUALS = (residual.residual_kernel, shard_residual.shard_residual_kernel, shard_residual.shard_recover_kernel)
OF_FILTERS = ("count_ptr", "ids_ptr", "sent_count_ptr", "sent_ids_ptr", "flat_pos_ptr")
OF_DRAFTS = ("target_logit_ptr", "sent_logit_ptr", "masses_ptr", "sent_masses_ptr", "cut_masses_ptr")
OF_DRAFT_LOGITS = ("sent_draft_max_ptr", "sent_draft_sum_ptr", "cut_draft_max_ptr", "cut_draft_sum_ptr")


def shard_launches(types: dict[str, str], draft: str, filtered: bool) -> list:
    """Launches of a rank, given the types of a single rank's arguments."""
    types = types | dict.fromkeys(SHARD_INTS, "*i32") | dict.fromkeys(SHARD_FLOATS, "*fp32")
    types |= dict.fromkeys(SHARD_SCALARS, "i32")
    types |= dict.fromkeys(("parts_ptr", "sent_parts_ptr", "cut_ptr"), types["logits_ptr"])
    if draft == "logits":
        types |= dict.fromkeys(OF_DRAFT_LOGITS, "*fp32")
    if draft != "one-hot":
        types |= dict.fromkeys(OF_DRAFTS, "*fp32") | {"token_ptr": "*i32", "sent_token_ptr": "*i32"}
    options = launch.decide_options(DEFAULTS, filtered)
    kernels = [
        (sweep.shard_sweep_kernel, {"num_warps": DEFAULTS.statistics_warps}),
        (sweep.cut_tiles_kernel, {"num_warps": DEFAULTS.statistics_warps}),
        (shard_decide.shard_decide_kernel, options),
        (shard_decide.shard_end_kernel, {"num_warps": 1}),
    ]
    if draft != "one-hot":
        kernels += [
            (shard_residual.shard_residual_kernel, {"num_warps": DEFAULTS.residual_warps}),
            (shard_residual.shard_recover_kernel, {"num_warps": DEFAULTS.residual_warps}),
            (shard_residual.shard_write_kernel, {"num_warps": 1}),
        ]
    if filtered:
        types |= dict.fromkeys(OF_FILTERS, "*i32")
        types |= dict.fromkeys(("values_ptr", "sent_values_ptr", "flat_ptr"), types["logits_ptr"])
        kernels += [
            (filters.shard_filter_kernel, options),
            (flat.shard_pack_kernel, {"num_warps": DEFAULTS.decide_warps}),
            (flat.shard_flat_kernel, options),
        ]
    return [(*each, types) for each in kernels]


def variants(with_all: bool):
    """Yield (variant name, constants, launches with options and argument types) for all that serving can produce."""
    for dtype, runner, draft, filtered, method in itertools.product(
        DTYPES, ("v1", "v2"), ("one-hot", "probs", "logits"), (False, True), ("exact", "greedy", *METHODS)
    ):
        greedy, (name, *mixed) = method == "greedy", method.split("-")
        if (name == "block" and draft == "one-hot") or (name == "budget" and draft != "one-hot"):
            continue
        if (greedy and (filtered or draft != "one-hot")) or draft == ("logits" if runner == "v1" else "probs"):
            continue
        if (filtered or method in METHODS) and (dtype, runner) != ("bf16", "v2") and not with_all:
            continue
        if filtered and method in METHODS and not with_all:
            continue
        if dtype != "bf16" and runner == "v1" and not with_all:
            continue
        types = dict(COMMON, logits_ptr="*" + dtype, token_ids_ptr="*i32" if runner == "v1" else "*i64")
        if runner == "v2":
            types["state_indices_ptr"] = "*i64"
        if greedy:
            for name in ("temperature_ptr", "seeds_ptr", "positions_ptr"):
                del types[name]
        if draft == "probs":
            types["draft_probs_ptr"] = "*fp32"
        if draft == "logits":
            types |= {"draft_logits_ptr": "*" + dtype, "draft_tile_max_ptr": "*fp32", "draft_tile_sum_ptr": "*fp32"}
        if draft != "one-hot":
            types |= {"residual_ptr": "*fp32", "row_ptr": "*fp32", "pending_ptr": "*i32"}
        if name in WITH_CONSTANTS:
            types["constants_ptr"] = "*fp32"
        if mixed:
            types["rule_requests_ptr"] = "*fp32" if name == "budget" else "*i1"
        if name == "typical":
            types["tile_entropy_ptr"] = "*fp32"
        if name == "budget":
            types["row_ptr"] = "*fp32"
        if filtered:
            types |= {"top_k_ptr": "*i32", "top_p_ptr": "*fp32", "min_p_ptr": "*fp32"}
            types |= {"tile_list_ptr": "*i32", "candidates_ptr": "*fp32", "row_ptr": "*fp32"}
        launches = [
            (statistics.statistics_kernel, {"num_warps": DEFAULTS.statistics_warps}, types),
            (decide.decide_kernel, launch.decide_options(DEFAULTS, filtered), types),
        ]
        if not greedy:
            alone = {name: kind for name, kind in types.items() if name != "row_ptr"} | {"tile_list_ptr": "*i32"}
            launches += [
                (audit.audit_sweep_kernel, {"num_warps": DEFAULTS.statistics_warps}, types),
                (audit.audit_kernel, audit.audit_options(DEFAULTS, filtered, filtered), alone),
            ]
        if filtered:
            launches.append((audit.audit_kernel, audit.audit_options(DEFAULTS, True, False), types))
        if draft != "one-hot":
            launches.append((residual.residual_kernel, {"num_warps": DEFAULTS.residual_warps}, types))
        if method in ("exact", "greedy"):
            launches += shard_launches(types, draft, filtered)
        tile, steps, _, _, padded_tiles = launch.row_tiling(VOCAB_SIZE, DEFAULTS, filtered)
        known = {
            "COMPACT_DRAFTS": runner == "v1",
            "KEY_BITS": launch.KEY_BITS[DTYPES[dtype]],
            "TILE": tile,
            "STEPS": steps,
            "PADDED_TILES": padded_tiles,
            "ROW_TILE": tile,
            "PADDED_ROW_TILES": padded_tiles,
            "BLOCK_K": BLOCK_K,
            "RULE": 0 if greedy else list(RULES).index(name),
            "RANKS": RANKS,
            "IS_FILTERED": filtered,
        }
        yield (
            "-".join(filter(None, [dtype, runner, draft, "filtered" if filtered else "", method])),
            known,
            launches,
        )


def orders(ttgir: str) -> list[str]:
    """In which order a kernel adds up: operation, shape and layout of its floating-point reductions and scans."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    found = set()
    for operation in re.finditer(r'"tt\.(reduce|scan)"', ttgir):
        shape, layout = re.search(r"\) : \(tensor<([^,>]*f\d+|[^,>]*i\d+), (.*?)>", ttgir[operation.end() :]).groups()
        body = ttgir[operation.end() : ttgir.index(") : (tensor<", operation.end())]
        if "arith.addf" in body:
            layout = re.sub(r"#\w+", lambda alias: layouts.get(alias[0], alias[0]), layout)
            found.add(f"{operation[1]} {shape} {layout}")
    return sorted(found)


def main() -> None:
    architecture = int(sys.argv[1])
    seen = set()
    for variant, known, launches in variants(sys.argv[2:] == ["all"]):
        for kernel, options, types in launches:
            known_here = {name: known[name] for name in kernel.arg_names if name in known}
            if kernel in RESIDUALS:
                tiling = launch.tiling(VOCAB_SIZE, DEFAULTS.tile, DEFAULTS.residual_steps)
                of_residual = {"TILE": tiling[0], "STEPS": tiling[1], "PADDED_TILES": tiling[4]}
                known_here |= {name: value for name, value in of_residual.items() if name in known_here}
            used = {name: types.get(name) for name in kernel.arg_names if name not in known}
            key = (kernel.__name__, tuple(sorted((used | known_here).items(), key=str)))
            if key in seen:
                continue
            seen.add(key)
            aligned = {name for name in used if name in ALIGNED or name.endswith("_ptr")} - set(pieces.UNALIGNED)
            compiled = compile_kernel(
                kernel,
                types,
                known_here,
                options["num_warps"],
                architecture,
                aligned,
                max_registers=options.get("maxnreg"),
            )
            result = {
                "kernel": compiled.name,
                "variant": variant,
                "registers": compiled.registers,
                "spilled_bytes": compiled.spilled,
                "cubin_bytes": len(compiled.cubin),
                "orders": orders(compiled.ttgir),
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
