"""The shipped configurations compiled by the newest Triton release, by the checks of `test_compiled`.

`make test` installs that release into a folder of its own; the environment keeps the one that the tiles were tuned with.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import compile_cases
import pytest
from compile_cases import JOBS, KNOWN_SPILLS_NEWEST

ROOT = Path(__file__).resolve().parents[2]


def newest_folder() -> Path:
    """Where the Makefile puts the release that it names."""
    named = re.search(r"^TRITON_NEWEST := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named, "the Makefile names no TRITON_NEWEST"
    return ROOT / ".cache" / f"triton-{named[1]}"


@pytest.fixture(scope="session")
def compiled() -> dict[str, dict]:
    folder = newest_folder()
    if not folder.is_dir():
        missing = f"{folder.relative_to(ROOT)} is not there: `make {folder.relative_to(ROOT)}` installs it"
        assert not os.environ.get("CI"), missing
        pytest.skip(missing)
    return compile_cases.compile_all(folder)


@pytest.mark.parametrize("name", JOBS)
def test_shipped_configurations_compile(name, compiled):
    compile_cases.check(name, compiled[name], KNOWN_SPILLS_NEWEST)
