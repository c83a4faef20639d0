"""Launch shapes: tokens of a tile, tiles of a program, warps of each kernel; per GPU where a table says so.

A table is a small JSON file, ``{"device": NAME, "shapes": {...}}``, with the name as PyTorch gives it. The environment
variable SPECOPT_LAUNCH_TABLE names one; else ``tables/NAME.json`` beside this file is taken, blanks in the name being
underscores; else the defaults, which were chosen from counts of machine code. A shape never depends on the batch, so
that a table changes what is compiled at start-up and nothing that is compiled later.
"""

import json
import os
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

VARIABLE = "SPECOPT_LAUNCH_TABLE"
TABLES = Path(__file__).parent / "tables"


class Shapes(NamedTuple):
    """All are powers of two.

    tile, filter_tile: Tokens of a tile, the same for every kernel of a step; the second where a request filters.
    statistics_steps, residual_steps: Tiles of the first kind that one program of these kernels sweeps.
    statistics_warps, decide_warps, residual_warps: Warps of a program.
    filter_warps, filter_registers: Those of the deciding kernel where a request filters, and registers that each of its
        threads may use: left to itself, the assembler takes so many that one program fills a multiprocessor.
    """

    tile: int = 1024
    filter_tile: int = 256
    statistics_steps: int = 2
    statistics_warps: int = 1
    decide_warps: int = 2
    filter_warps: int = 8
    filter_registers: int = 128
    residual_steps: int = 8
    residual_warps: int = 2


DEFAULTS = Shapes()
LIMITS = dict.fromkeys(Shapes._fields, (1, 32)) | {"tile": (16, 16384), "filter_tile": (16, 1024)}
LIMITS["filter_registers"] = (64, 256)
"""Smallest and largest value of each."""


class TableError(ValueError):
    """A table cannot be used; the message is one sentence."""


def device_name(device: torch.device) -> str:
    """Name of a device as tables have it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def shapes_of(device: torch.device) -> Shapes:
    """Shapes for a device; a table that cannot be used leaves the defaults, with a warning."""
    name = device_name(device)
    path = Path(os.environ.get(VARIABLE) or TABLES / file_name(name))
    if not os.environ.get(VARIABLE) and not path.is_file():
        return DEFAULTS
    try:
        return read(path, name)
    except TableError as error:
        warnings.warn(f"{error}: the default launch shapes are used.", RuntimeWarning, stacklevel=3)
        return DEFAULTS


def file_name(device: str) -> str:
    """File name of a device's table."""
    return f"{device.replace(' ', '_').replace('/', '_')}.json"


def read(path: Path, device: str) -> Shapes:
    """Read the table of a device.

    Raises:
        TableError: It cannot be read, is another device's, or holds something else than shapes.
    """
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TableError(f"the launch table {path} cannot be read ({error})") from error
    if not isinstance(table, dict) or not isinstance(table.get("shapes"), dict):
        raise TableError(f'the launch table {path} is not of the form {{"device": NAME, "shapes": {{...}}}}')
    if table.get("device") != device:
        raise TableError(f"the launch table {path} is for {table.get('device')!r}, this device is {device!r}")
    for name, value in table["shapes"].items():
        if name not in Shapes._fields:
            raise TableError(f"the launch table {path} has the unknown shape {name!r}")
        low, high = LIMITS[name]
        if type(value) is not int or not low <= value <= high or value & (value - 1):
            raise TableError(f"the launch table {path} has {name} {value!r}, expected a power of 2, {low} to {high}")
    return DEFAULTS._replace(**table["shapes"])


def write(path: Path, device: str, shapes: Shapes, **more: object) -> None:
    """Write a device's table, with whatever else should be remembered of it."""
    path.write_text(json.dumps({"device": device, "shapes": shapes._asdict(), **more}, indent=1) + "\n")
