"""The layouts that tests go through."""

from __future__ import annotations

import pytest

from longctx.layout import LAYOUTS, Striped

# The registered ones, and those that only a constructor makes.
CASES = {**LAYOUTS, "striped3": Striped(block=3)}
LAYOUT_CASES = pytest.mark.parametrize("layout", CASES.values(), ids=CASES.keys())
