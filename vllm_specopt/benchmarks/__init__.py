"""A source checkout keeps these modules in benchmarks/ at its root; a wheel carries them here."""

from pathlib import Path

__path__.append(str(Path(__file__).parents[2] / "benchmarks"))
