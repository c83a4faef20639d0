"""Is this the host that the run was prepared for? One sentence where it is not."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version

from first_run.places import BUNDLE, UNPACKED

PYTHON, TORCH, TRITON = (3, 12), "2.11.", "3.6."
PIECES = ("python.tar.xz", "native.tar.xz")
ANYWAY = "SPECOPT_ANY_HOST"


def problem() -> str | None:
    """What is wrong with this host, in one sentence; None if nothing is, or if it was told to run anyway."""
    if missing := missing_pieces():
        return f"{BUNDLE} lacks {' and '.join(missing)}: make the bundle with scripts/gpu/make_bundle.sh {BUNDLE.name}."
    found = None if os.environ.get(ANYWAY) == "1" else wrong_versions(sys.version_info[:2], installed)
    return found or no_gpu()


def missing_pieces() -> list[str]:
    """Files that the bundle lacks, where it has not been unpacked before."""
    if (UNPACKED / "env.sh").is_file():
        return []
    return [name for name in PIECES if not (BUNDLE / name).is_file()]


def wrong_versions(python: tuple[int, int], version_of) -> str | None:
    """What differs from the versions that the bundle is for."""
    if python != PYTHON:
        found = "Python {}.{}, the bundle is for {}.{}".format(*python, *PYTHON)
    else:
        wanted = (("torch", TORCH), ("triton", TRITON))
        others = [(name, prefix) for name, prefix in wanted if not version_of(name).startswith(prefix)]
        if not others:
            return None
        found = " and ".join(f"{name} {version_of(name) or 'missing'} ({prefix}x wanted)" for name, prefix in others)
    return f"this host has {found}: {ANYWAY}=1 runs all the same."


def no_gpu() -> str | None:
    """The sentence for a host whose GPU PyTorch does not see."""
    import torch

    return None if torch.cuda.is_available() else "PyTorch sees no GPU here: SPECOPT_REHEARSE=1 rehearses on a CPU."


def installed(name: str) -> str:
    """Version of a distribution, empty where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
