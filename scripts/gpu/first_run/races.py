"""10,000 launches in a row, each compared with what is right.

The last program of a request to arrive writes; a race would show as another token in some launch. Outputs are poisoned
before each. What is right comes from the float64 reference; a request whose draw is too close to call takes the tokens
of the first launch, which every other one has to repeat.
"""

from __future__ import annotations

import sys
import time

import torch

from first_run import batches, timing
from first_run.places import REHEARSE, STANDIN, save
from vllm_specopt.benchmarks.kernels.grid import Case
from vllm_specopt.benchmarks.kernels.inputs import make_inputs
from vllm_specopt.kernels.launch import verify_batch
from vllm_specopt.kernels.reference import verify_ref
from vllm_specopt.testing import MARGIN

LAUNCHES = 4 if REHEARSE else 200 if STANDIN else 10_000
# Some programs per row, and more programs than the card holds at once.
CASES = {
    "one-hot": Case(2, 2, 300, dtype="fp32", temperature=0.7) if REHEARSE else Case(96, 7, 20_000, temperature=0.7)
}
if not REHEARSE:
    CASES |= {form: Case(96, 7, 20_000, **batches.FORMS[form]) for form in ("draft logits", "top-k, top-p")}
POISON = -7
CHECKED = 500


def main(seconds: float) -> None:
    """Write races.json, after each case."""
    deadline = time.monotonic() + seconds - 3
    found: dict = {}
    for name, case in CASES.items():
        left = deadline - time.monotonic()
        found[name] = race(case, time.monotonic() + left / (len(CASES) - len(found)))
        save("races", found)
    print(found)


def race(case: Case, deadline: float) -> dict:
    """Launch again and again; how many launches differed from the reference, and how many were made."""
    inputs = make_inputs(case, timing.device(), batches.SEED)
    rounds = [inputs.round(number) for number in range(4)]
    token_ids = torch.empty(case.batch, case.num_drafts + 1, dtype=torch.int32, device=inputs.device)
    num_sampled = torch.empty(case.batch, dtype=torch.int32, device=inputs.device)

    def call(number: int) -> None:
        batch = rounds[number % len(rounds)]
        verify_batch(*batch.args()[:3], token_ids=token_ids, num_sampled=num_sampled, **batch.kwargs)

    expected, close = [], 0
    for number, batch in enumerate(rounds):
        call(number)
        right = verify_ref(*batch.to("cpu").args(), **batch.to("cpu").kwargs)
        wanted = right.token_ids.to(token_ids)
        for request, margin in enumerate(right.margin):
            if margin < MARGIN:
                wanted[request] = token_ids[request]
                close += 1
        expected.append(wanted)
    wrong = torch.zeros((), dtype=torch.int64, device=token_ids.device)
    done = 0
    while done < LAUNCHES and time.monotonic() < deadline:
        for _ in range(min(CHECKED, LAUNCHES)):
            token_ids.fill_(POISON)
            num_sampled.fill_(POISON)
            call(done)
            wanted = expected[done % len(expected)]
            wrong += ((token_ids != wanted).any() | (num_sampled != (wanted >= 0).sum(1)).any()).long()
            done += 1
        wrong.item()
    return {"case": case.name, "launches": done, "differed": int(wrong), "too_close_to_call": close}


if __name__ == "__main__":
    main(float(sys.argv[1]))
