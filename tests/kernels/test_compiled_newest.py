"""The shipped configurations compiled by the newest Triton release, by the checks of `test_compiled`: a covering few in `make
test`, all of them in `make test-all`.

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


SAMPLE = compile_cases.covering(JOBS)


@pytest.fixture(scope="session")
def compiled(request) -> dict[str, dict]:
    folder = newest_folder()
    if not folder.is_dir():
        missing = f"{folder.relative_to(ROOT)} is not there: `make {folder.relative_to(ROOT)}` installs it"
        assert not os.environ.get("CI"), missing
        pytest.skip(missing)
    # What will be asked for.
    tests = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    return compile_cases.compile_all(folder, [test.callspec.params["name"] for test in tests])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.slow) for name in JOBS]
)
def test_shipped_configurations_compile(name, compiled):
    compile_cases.check(name, compiled[name], KNOWN_SPILLS_NEWEST)


def test_the_few_cover_every_setting_of_every_kernel():
    for key in ("head_dim", "kind", "dtype", "softcap", "fresh", "final", "carry", "capability"):
        of_all, of_few = (
            {(JOBS[name]["kernel"], JOBS[name].get(key)) for name in names if key in JOBS[name]}
            for names in (JOBS, SAMPLE)
        )
        assert of_few == of_all, key
    assert 3 * len(SAMPLE) < 2 * len(JOBS)
