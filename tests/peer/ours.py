"""A pytest plugin: in vLLM's test modules our V1 class takes the place of vLLM's, and everything runs on a CPU."""

import ast
from pathlib import Path

import pytest

LEFT_TO_STOCK = {
    "test_synthetic_all_accepted": "the method synthetic is left to vLLM's class",
    "test_synthetic_all_rejected": "the method synthetic is left to vLLM's class",
}
"""Tests that are not run, by function, with the reason."""


def functions(path: Path) -> set[str]:
    """Names of a test module's functions."""
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def pytest_configure(config: pytest.Config) -> None:
    """What a CPU worker does before it builds a sampler: vLLM's functions, which some tests call, need it."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        current_platform.register_triton_kernel_overrides()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put our class in, and leave out the tests of what is not ours."""
    from vllm_specopt.integration.v1 import RejectionSampler

    for module in {item.module for item in items}:
        module.RejectionSampler, module.DEVICE_TYPE = RejectionSampler, "cpu"
    left = [item for item in items if item.originalname in LEFT_TO_STOCK]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]
