"""Count kernels in processes of their own, as Triton decides for a process whether it interprets.

Usage: count_kernels.py record | toy ARCHITECTURE | ours SETTING .... ``record`` interprets the toy kernels and prints
their launches; ``toy`` counts them, then with a description that lacks something and with counts that are wrong;
``ours`` prints what exceeds a budget in the settings named, on architecture 90.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict

BLOCK = 1024
SHAPE, WIDE = (1, 3), (64, 7)
ROUNDS = (0, 5, 8, 2)


def record() -> None:
    import torch
    from toy_kernels import search_kernel, toy_kernel

    from vllm_specopt.benchmarks.kernels.watching import install, watch

    install()
    x = torch.rand(BLOCK * max(ROUNDS))
    rounds = torch.tensor(ROUNDS, dtype=torch.int32)
    out, found = torch.empty(len(ROUNDS), BLOCK), torch.empty(1, dtype=torch.int32)
    with watch(1, 1, 1) as launches:
        toy_kernel[(len(ROUNDS),)](x, rounds, out, BLOCK=BLOCK)
        x.mul_(20)
        search_kernel[(1,)](x, found, 16, BLOCK=128)
    print(json.dumps([launch.as_json() for launch in launches]))


def toy(architecture: int) -> None:
    from vllm_specopt.benchmarks.kernels import weights
    from vllm_specopt.benchmarks.kernels.counting import count_launch, machine_code

    launches = recorded()
    answer = {"counts": [asdict(count_launch(launch, architecture)) for launch in launches], "undescribed": []}
    toy_launch = launches[0]
    for runs in ({}, {"toy_kernel -> sweep: for": 3}, {"sweep: for step": 3, "toy_kernel: if rounds % 2": 0.5}):
        try:
            weights.weigh(machine_code(toy_launch, architecture), weights.described(runs))
            answer["undescribed"].append("")
        except weights.Undescribed as error:
            answer["undescribed"].append(str(error))
    toy_launch.counts = {key: 1 if key[2] == "round" else number for key, number in toy_launch.counts.items()}
    try:
        count_launch(toy_launch, architecture)
    except ValueError as error:
        answer["lying"] = str(error)
    answer["loads_found"] = count_launch(toy_launch, architecture, strict=False).loads_found
    print(json.dumps(answer))


def recorded() -> list:
    from vllm_specopt.benchmarks.kernels.watching import Launch

    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__, "record"], env=env, capture_output=True, text=True, check=True)
    return [Launch.from_json(fields) for fields in json.loads(done.stdout)]


def ours(settings: list[str]) -> None:
    from vllm_specopt.benchmarks.kernels import budgets, cost

    planned = cost.plan([SHAPE], [*cost.SETTINGS], SHAPE)
    # A small step is mostly launches.
    planned = [item for item in planned if not item[1].audit] + [i for i in cost.plan([WIDE], more=WIDE) if i[1].audit]
    planned = [(setting, step) for setting, step in planned if step.who == cost.OURS and setting in settings]
    for line in budgets.violations(cost.count_steps(planned, [90])):
        print(line)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "record":
        record()
    elif what == "toy":
        toy(int(rest[0]))
    else:
        ours(rest)
