"""Proof that verification is lossless, deterministic and unbreakable; ``run.py`` runs it, docs/proof.md shows a run."""
