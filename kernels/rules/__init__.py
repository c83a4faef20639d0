"""Verification rules, one file each: how a sampled draft is tested and what its recovered token is drawn from."""
