"""Several machines: who may talk across them, and two agents of torchrun that train together."""

from __future__ import annotations

import re
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from run_cases import TRAIN, Background, free_port, train, write_config

from longctx.config import load_config
from longctx.launch import Place
from longctx.metrics import read_metrics
from longctx.parallel.nodes import node_problems
from longctx.parallel.plan import ParallelPlan


@pytest.mark.parametrize(
    ("degrees", "node", "world"),
    [
        ({"ulysses": 4}, 4, 16),
        ({"tp": 2, "ulysses": 2}, 4, 16),
        ({"tp": 2}, 4, 16),
        # The ring, dp and pp may cross, and one machine is no border.
        ({"ring": 16}, 4, 16),
        ({"ulysses": 8}, 8, 8),
        ({"ulysses": 8, "allow_across_nodes": True}, 4, 16),
    ],
)
def test_groups_within_a_machine_may_talk_in_every_layer(degrees, node, world):
    plan = ParallelPlan(**degrees)
    assert node_problems(plan, node_size=node, world_size=world) == []
    if not plan.allow_across_nodes:
        whole = ParallelPlan(**{"dp": world // (plan.sp * plan.tp)} | degrees)
        for rank in range(world):
            at = whole.coords(rank)
            for other in range(world):
                there = whole.coords(other)
                if (at.dp, at.pp, at.ring) == (there.dp, there.pp, there.ring):
                    assert rank // node == other // node


@pytest.mark.parametrize(
    ("degrees", "node", "world", "what", "offered"),
    [
        ({"ulysses": 8, "ring": 2}, 4, 16, "tp 1 x ulysses 8 = 8 processes", "tp 1, ulysses 4, ring 4"),
        ({"tp": 4}, 2, 8, "tp 4: they exchange", "tp 2, ulysses 1, ring 2"),
        ({"tp": 2, "ulysses": 4}, 4, 16, "tp 2 x ulysses 4 = 8 processes", "tp 2, ulysses 2, ring 2"),
        # Groups of 3 over machines of 4: the second one is on both.
        ({"ulysses": 3}, 4, 12, "tp 1 x ulysses 3 = 3 processes", "tp 1, ulysses 1, ring 3"),
        ({"tp": 8, "ulysses": 2}, 4, 16, "tp 8 x ulysses 2 = 16 processes", "tp 4, ulysses 1, ring 4"),
    ],
)
def test_groups_that_cross_machines_are_refused_with_what_does_not(degrees, node, world, what, offered):
    ((said, hint),) = (
        (p.what, p.hint) for p in node_problems(ParallelPlan(**degrees), node_size=node, world_size=world)
    )
    assert said.startswith(what)
    assert f"a machine has {node}" in said
    assert f"{offered} for the same processes; or parallel.allow_across_nodes = true" in hint
    better = ParallelPlan(**{name: int(n) for name, n in (pair.split() for pair in offered.split(", "))})
    assert node_problems(better, node_size=node, world_size=world) == []
    assert better.sp * better.tp == ParallelPlan(**degrees).sp * ParallelPlan(**degrees).tp


def test_the_launchers_say_how_many_processes_a_machine_has():
    env = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    assert Place.from_env(env | {"LOCAL_WORLD_SIZE": "2"}).local_world_size == 2
    assert Place.from_env(env | {"LOCAL_SIZE": "4"}).local_world_size == 4
    assert Place.from_env(env).local_world_size is None


def test_a_configuration_is_checked_with_its_machines():
    words = ["--model.num_heads=8", "--parallel.ulysses=8"]
    assert load_config(None, words).check(16) == []
    assert load_config(None, words).check(16, 8) == []
    (problem,) = load_config(None, words).check(16, 4)
    assert "a machine has 4" in problem.what
    assert load_config(None, [*words, "--parallel.allow_across_nodes=true"]).check(16, 4) == []


def two_agents(folder: Path, *words: str | Path) -> list[tuple[int, str]]:
    """torchrun twice on this machine, one process each, as on two machines; (exit code, output) of each."""
    port = free_port()
    told = []
    with ExitStack() as stack:
        agents = []
        for node in range(2):
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
            command += ["--node-rank", str(node), "--rdzv-backend", "c10d", "--rdzv-id", "pair"]
            command += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1", str(TRAIN)]
            command += map(str, words)
            agents.append(stack.enter_context(Background(command, folder / f"agent{node}")))
        for agent in agents:
            code = agent.wait(120)
            told.append((code, agent.output))
    return told


def test_two_agents_of_torchrun_train_as_one_process_does(tmp_path):
    (tmp_path / "alone").mkdir()
    words = ("--config", write_config(tmp_path))
    done = train("forked", 1, *words, f"--train.run_dir={tmp_path}/alone")
    assert done.returncode == 0, done.stdout
    told = two_agents(tmp_path, *words, "--parallel.ring=2")
    assert [code for code, _ in told] == [0, 0], told
    assert "on 2 processes, 1 on each machine" in told[0][1] + told[1][1]
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "alone"))
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-5)
    assert len(ours) == 3


def test_ulysses_over_two_machines_is_refused_before_anything_starts(tmp_path):
    words = ("--config", write_config(tmp_path), "--model.num_heads=4")
    # Four processes, of which each machine has two.
    done = train("forked", 4, *words, "--parallel.ulysses=4", LOCAL_WORLD_SIZE="2")
    assert done.returncode == 2, done.stdout
    assert len(re.findall("tp 1 x ulysses 4 = 4 processes exchange activations", done.stdout)) == 1, done.stdout
    assert "tp 1, ulysses 2, ring 2 for the same processes" in done.stdout
    assert not (tmp_path / "run").exists()
