"""Set-up of all tests: Triton's interpreter where there is no GPU, the ``gpu`` marker, one seed."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so set before any is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _skip_missing_backend(request: pytest.FixtureRequest) -> None:
    """Skip a test of a backend that serves nothing on this machine, with the backend's own reasons."""
    from betaclip.env import OPERATIONS

    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    probe = torch.zeros(1, 8, device="cuda" if torch.cuda.is_available() else "cpu")
    for table in OPERATIONS.values():
        if backend in table and (reasons := table[backend](probe, probe)):
            pytest.skip(f"{backend}: {'; '.join(reasons)}")
