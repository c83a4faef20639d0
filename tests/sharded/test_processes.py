"""Two processes that exchange over gloo emit the tokens of the whole logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support.gloo_rank import STEPS, batch_of

from vllm_specopt.verify import verify

TESTS = Path(__file__).parents[1]


def test_two_processes_over_gloo(tmp_path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    env["GLOO_SOCKET_IFNAME"] = "lo"
    script, store = str(TESTS / "support" / "gloo_rank.py"), str(tmp_path / "store")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), "2", store],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], [errors[-2000:] for _, errors in ended]
    first, second = ([json.loads(line) for line in out.splitlines()] for out, _ in ended)
    assert len(first) == STEPS
    assert first == second
    for step, (token_ids, num_sampled) in enumerate(first):
        batch, _ = batch_of(step)
        expected = verify(*batch.args(), **batch.kwargs)
        assert token_ids == expected.token_ids.tolist()
        assert num_sampled == expected.num_sampled.tolist()
