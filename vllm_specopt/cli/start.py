"""Where the `specopt` command begins: without what only the tools need, it says what to install."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("httpx", "rich", "typer")


def main() -> None:
    """Run the command; one sentence and status 2 where a package of the extra ``tools`` is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"specopt: {', '.join(missing)} not installed beside {sys.executable}: pip install 'vllm-specopt[tools]'.\n"
        )
        sys.exit(2)
    from vllm_specopt.cli.main import app

    app()
