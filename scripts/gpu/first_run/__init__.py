"""The first GPU run, step by step; scripts/gpu/README.md."""
