"""Verification case by case: timed beside vLLM's own, and counted from machine code."""
