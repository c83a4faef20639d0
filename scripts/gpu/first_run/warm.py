"""The engines to be timed, once and briefly, beside another step: what they compile stays in Triton's cache."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from first_run import engines, seeds

AT_ONCE, SECONDS, LENGTH = 2, 200, 8


def main() -> None:
    """Run them; what goes wrong here will say so where it is timed."""
    deadline = time.monotonic() + SECONDS
    pair = engines.wait_for_pair(deadline)
    prompts = engines.shipped_prompts()
    engines.FOLDER.mkdir(parents=True, exist_ok=True)

    def run(one: engines.Run) -> None:
        asked = seeds.request(one, pair, prompts) | {"warmup_len": LENGTH, "output_len": LENGTH}
        del asked["llm"]["attention_backend"]
        engines.engine(one, asked, max(1.0, deadline - time.monotonic()))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(run, engines.chosen()))


if __name__ == "__main__":
    main()
