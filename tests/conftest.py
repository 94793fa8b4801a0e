"""What every test shares: reproducible property tests, and GPU tests that say why they are skipped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# derandomize: the same examples on every machine and in every run. No deadline: CI machines are shared.
settings.register_profile("longctx", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("longctx")

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    devices = torch.cuda.device_count()
    for item in items:
        for marker, needed in (("gpu2", 2), ("gpu", 1)):
            if item.get_closest_marker(marker) and devices < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), this machine has {devices}"))
