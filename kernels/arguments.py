"""Which arguments Triton may specialise a kernel on; every specialisation is compiled at start-up, none while serving.

Triton compiles a kernel anew when a pointer stops being a multiple of 16 bytes, or an integer becomes 1 or a multiple
of 16. That pays where a program sweeps a vocabulary: the base pointers, strides and length of rows of logits stay
specialised. These are the same in every step of an engine. The other pointers are read by a few loads each, and a
runner that verifies in chunks passes slices of them that start anywhere.
"""

UNALIGNED = (
    "cu_num_logits_ptr",
    "draft_token_ids_ptr",
    "state_indices_ptr",
    "temperature_ptr",
    "seeds_ptr",
    "positions_ptr",
    "top_k_ptr",
    "top_p_ptr",
    "min_p_ptr",
    "sigmoid_ptr",
    "sigmoid_requests_ptr",
    "threshold_ptr",
    "tile_max_ptr",
    "tile_sum_ptr",
    "tile_argmax_ptr",
    "draft_tile_max_ptr",
    "draft_tile_sum_ptr",
    "num_accepted_ptr",
    "counters_ptr",
    "candidate_score_ptr",
    "candidate_token_ptr",
    "target_score_ptr",
    "target_token_ptr",
    "token_ids_ptr",
    "num_sampled_ptr",
    "bonus_token_ids_ptr",
    "bad_row_counter_ptr",
)
"""Pointers that a kernel is not specialised on the alignment of; a kernel ignores names it does not have."""
