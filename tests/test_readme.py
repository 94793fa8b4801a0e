"""What the README says is so: its code runs, its commands exist, its settings and files are there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import longctx
from longctx import bench, bench_ring, bench_scaling, check, draw, evaluation, info, numerics, planner, results
from longctx.__main__ import COMMANDS, TrainArguments
from longctx.config import Config, load_config
from longctx.config_loader import key_names
from longctx.table_parts import latest
from longctx.weights import export_parser, import_parser, parse_bytes

ROOT = Path(longctx.__file__).parent.parent
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in CODE if language == "python"]
COMMAND_LINES = [
    line for language, text in CODE if language == "bash" for line in text.replace("\\\n", "").splitlines()
]


def test_the_blocks_are_of_known_languages():
    assert {language for language, _ in CODE} == {"python", "bash"}
    assert len(PYTHON) == 3
    assert len(README.split("```")) == 2 * len(CODE) + 1


@pytest.mark.parametrize("code", PYTHON, ids=["five_lines", "own_transformer", "hugging_face"])
def test_python_runs(code, tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


def test_the_first_example_is_five_lines_and_its_imports():
    lines = [line for line in PYTHON[0].splitlines() if line and not line.startswith(("import ", "from "))]
    assert len(lines) <= 5


def test_the_first_screen_says_what_the_table_says():
    """Ranges over the causal and full rows of head dim 128 and the forward of 64, the backward of 256; of our kernel, cuDNN, FA4."""
    rows = latest([r for r in results.read(results.RESULTS / "attention.csv") if r.name.startswith("attention/")])

    def speeds(system, metric, heads, *masks):
        of = [r for r in rows if r.name == f"attention/{system}" and r.metric == metric and not r.source]
        return sorted(round(r.value) for r in of if r.config.endswith(tuple(f"heads of {heads}, {m}" for m in masks)))

    told = " ".join(README[: README.index("On two H200")].split())
    for metric in ("forward", "backward"):
        for system in ("hopper", "cudnn-torch", "fa4"):
            found = speeds(system, metric, 128, "causal", "full")
            assert len(found) == 5
            assert f"{found[0]} to {found[-1]}" in told, (system, metric)
    for system in ("hopper", "fa4"):
        found = speeds(system, "forward", 64, "causal")
        assert f"{found[0]} to {found[-1]}" in told, system
    (ours,), (cudnn,), (fa4,) = (
        speeds(system, "backward", 256, "causal") for system in ("hopper", "cudnn-torch", "fa4")
    )
    assert f"at head dim 256 {ours}, where they have {cudnn} and {fa4}." in told


def _make(words):
    run = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def _train(words, world_size):
    arguments = TrainArguments.parse(words)
    assert arguments.config is None or (ROOT / arguments.config).is_file(), f"no {arguments.config}"
    config = load_config(arguments.config and ROOT / arguments.config, arguments.overrides)
    assert config.check(arguments.world_size or world_size) == []


def _longctx(words):
    command, *rest = words
    assert command in COMMANDS
    if command == "layout":
        assert draw.main(rest) == 0
    elif command == "plan":
        assert planner.main(rest) == 0
    elif command == "info":
        assert info.main(rest) == 0
    elif command == "check":
        assert check.prepare(rest).case.plan.world_size == int(rest[rest.index("--nproc") + 1])
    elif command == "bench" and "--smoke" in rest:
        assert bench.main(rest) == 0
    elif command == "bench" and rest[0] == "redraw":
        assert list(bench.parser().parse_args(rest).results.glob("*.csv"))
    elif command == "bench" and rest[0] == "scaling":
        args, settings = bench_scaling.parse(rest[1:])
        for point in bench_scaling.points(args.gpus, args.strong, args.weak):
            run = bench_scaling.command(point, args.config, args.runs, args.steps, settings)
            _train(run[run.index("train") + 1 :], world_size=point.gpus)
    elif command == "bench" and rest[0] == "ring":
        args = bench_ring.parser().parse_args(rest[1:])
        assert bench_ring._cases(args, args.nproc or 2)
        assert bench_ring._entrants(args, args.nproc or 2)
    elif command == "bench":
        args = bench.parser().parse_args(rest)
        assert bench._cases(args)
        assert bench._entrants(args)
    elif command == "eval":
        known, overrides = evaluation.parse(rest)
        assert load_config(known.config, overrides).check(1) == []
    elif command == "import":
        assert import_parser().parse_args(rest).config
    elif command == "export":
        assert parse_bytes(export_parser().parse_args(rest).shard_size)
    else:
        pytest.fail(f"longctx {command} in the README is run by no test")


def _pip(words):
    assert words[0] == "install"
    for constraints in (words[i + 1] for i, word in enumerate(words) if word == "-c"):
        assert (ROOT / constraints).is_file()
    pinned = (ROOT / ".constraints.txt").read_text().splitlines()
    for requirement in (word for word in words if "==" in word):
        assert requirement in pinned, f"{requirement} is not what .constraints.txt says"


def _python(words):
    if words[0] == "train.py":
        _train(words[1:], world_size=1)
    elif words[:2] == ["-m", "longctx.numerics"]:
        assert numerics.parser().parse_args(words[2:]).rings
    else:
        assert words[:2] == ["-m", "longctx.results"]
        args = results.parser().parse_args(words[2:])
        assert args.write or args.from_run or results.main(words[2:]) == 0


def _torchrun(words):
    from torch.distributed.run import parse_args

    agent = parse_args(words)
    assert agent.training_script == "train.py"
    _train(agent.training_script_args, int(agent.nproc_per_node) * int(agent.nnodes.split(":")[-1]))


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_commands_are_there_and_take_these_arguments(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(line)
    match program:
        case "make":
            _make(words)
        case "pip":
            _pip(words)
        case "longctx":
            _longctx(words)
        case "python":
            _python(words)
        case "torchrun":
            _torchrun(words)
        case "srun":
            # One task a machine, which is torchrun's agent there.
            assert words[words.index("--ntasks-per-node") + 1] == "1"
            agents = words.index("torchrun")
            assert words[words.index("--nodes") + 1] == words[words.index("--nnodes") + 1]
            _torchrun(words[agents + 1 :])
        case "deepspeed":
            from deepspeed.launcher.runner import parse_args

            assert parse_args(words).user_script == "train.py"
            _train(words[words.index("train.py") + 1 :], world_size=32)
        case _:
            pytest.fail(f"no test runs {program!r}")


def test_the_settings_and_their_defaults_are_right():
    rows = re.findall(r"^\| `(\w+\.\w+)` \| `([^`]*)` \|", README, re.MULTILINE)
    assert len(rows) >= 8
    config = Config()
    for key, default in rows:
        assert key in key_names()
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        assert default == (
            "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        ), key


def test_every_module_is_in_the_reading_order():
    reading = README.split("## Reading the code")[1]
    named = set(re.findall(r"`([\w/]+\.py)`", reading))
    there = {str(p.relative_to(ROOT / "longctx")) for p in (ROOT / "longctx").rglob("*.py")}
    assert named == there - {"__init__.py", "parallel/__init__.py"}


def test_named_files_and_make_targets_exist():
    for path in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"`((?:configs|tests|benchmarks)/[\w./]+)`", README):
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    for target in re.findall(r"`make ([\w-]+)`", README):
        _make([target])


def test_extras_named_in_messages_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in (ROOT / "longctx").rglob("*.py"):
        for extra in re.findall(r"longctx\[(\w+)\]", path.read_text()):
            assert extra in extras, f"{path.name} names the extra {extra}"


def test_context_parallel_is_said_once_so_that_people_find_it():
    assert README.count("context parallel") == 1


def test_ci_calls_make_test_and_keeps_its_exit_code(tmp_path):
    """With a `make` that prints a closing line and fails, .ci/run prints that line last and fails too."""
    fake = tmp_path / "make"
    fake.write_text(
        '#!/bin/sh\necho "make $*"\necho "== 1 failed, 2 passed in 3.45s =="\necho "make: *** [test]"\nexit 2\n'
    )
    fake.chmod(0o755)
    run = subprocess.run(
        [ROOT / ".ci" / "run"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 2
    assert run.stdout.splitlines()[0] == "make test"
    assert run.stdout.splitlines()[-1] == "== 1 failed, 2 passed in 3.45s =="


@pytest.mark.parametrize(("has_network", "is_ci"), [(True, True), (False, False), (False, True)])
def test_the_newest_triton_may_be_missing_except_on_ci(tmp_path, has_network, is_ci):
    """The Makefile's target for it, with an environment whose pip does or does not reach an index."""
    stub = tmp_path / ".venv" / "bin" / "python"
    stub.parent.mkdir(parents=True)
    # ... -m pip install --quiet --no-deps --target FOLDER triton==VERSION
    stub.write_text(f'#!/bin/sh\nmkdir -p "$7" && touch "$7/part"\nexit {0 if has_network else 1}\n')
    stub.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", ".constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / ".venv" / ".installed").touch()
    (folder,) = re.findall(r"^TRITON_NEWEST := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    folder = f".cache/triton-{folder}"
    env = {"PATH": "/usr/bin:/bin", **({"CI": "true"} if is_ci else {})}
    run = subprocess.run(["make", folder], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (run.returncode == 0) == (has_network or not is_ci), run.stderr
    assert (tmp_path / folder / "part").is_file() == has_network
    assert not (tmp_path / f"{folder}.part").exists()
    assert ("could not be installed" in run.stderr) == (not has_network)
