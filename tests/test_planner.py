"""What is estimated before a run: memory and time against what runs took, and plans that really are possible."""

from __future__ import annotations

import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_cases import MODEL, full_step

from longctx import step_time as step_time_module
from longctx.__main__ import main
from longctx.config import load_config
from longctx.engine import EngineConfig
from longctx.memory import rank_memory
from longctx.model import Transformer
from longctx.offload import LAYERS_HELD, ActivationOffload, KeptLayer
from longctx.parallel import cost
from longctx.parallel.degrees import attention_estimate
from longctx.parallel.plan import ParallelPlan
from longctx.planner import GIB, GPUS, USABLE, candidates, longest, parser, run
from longctx.results import RESULTS, read
from longctx.settings import parse_size
from longctx.step_time import step_time
from longctx.table_parts import latest, newest_commit

ONE_B = "configs/llama_1b_64k.toml"
EIGHT_B = "configs/llama3_8b_128k_ring8.toml"


def runs(commits: set[str] | None = None) -> dict[str, dict[str, float]]:
    """The measured trainings of the 1B model, of these commits or all: "64k tokens on 2, pp 2, 4 micro-batches" -> metric -> value."""
    found: dict[str, dict[str, float]] = {}
    for row in latest(read(RESULTS / "training.csv")):
        if commits is not None and row.commit not in commits:
            continue
        if row.name.startswith("train/longctx") and row.config.startswith("1.24B"):
            what = row.name.removeprefix("train/longctx").removeprefix(", ")
            key = f"{row.config.split(', ')[1]} on {row.gpus}, {what or 'ring'}"
            found.setdefault(key, {})[row.metric] = row.value
    return found


def newest() -> list[str]:
    """Those of the newest commit: kernels have become faster since the others."""
    rows = [row for row in read(RESULTS / "training.csv") if row.name.startswith("train/longctx")]
    return list(runs({newest_commit(rows)}))


RUNS = runs()
OF_TODAY = newest()


def config_of(key: str):
    """The configuration of a measured run and its plan."""
    length, gpus, what = re.fullmatch(r"(\d+k) tokens on (\d+), (.*)", key).groups()
    degrees = [f"--parallel.ring={gpus}"] if what == "ring" else []
    for word in what.split(", ") if what != "ring" else ():
        if word.endswith(" micro-batches"):
            degrees.append(f"--engine.accumulation_steps={word.split(' ')[0]}")
            continue
        name, value = word.split(" ")
        degrees.append({"ZeRO": f"--engine.zero_stage={value}"}.get(name, f"--parallel.{name}={value}"))
    config = load_config(ONE_B, [f"--data.seq_len={length}", *degrees])
    return config, config.parallel.resolve(int(gpus)), int(gpus)


def test_there_are_runs_to_compare_with():
    assert len(RUNS) >= 9
    assert len(OF_TODAY) >= 4


@pytest.fixture
def as_fast_as_can_be(monkeypatch):
    """What is fastest is taken, whatever it holds: as in the measured runs, of commits that knew nothing else."""
    attention_estimate.cache_clear()
    monkeypatch.setattr(cost, "WORTH", 1.0)
    yield
    attention_estimate.cache_clear()


@pytest.mark.parametrize("key", RUNS)
def test_memory_is_that_of_measured_runs(key, as_fast_as_can_be):
    config, plan, _ = config_of(key)
    estimate = rank_memory(config.model, config.engine, plan, config.data.seq_len)
    assert estimate.total / GIB == pytest.approx(RUNS[key]["memory"], rel=0.03)


@pytest.mark.parametrize("key", OF_TODAY)
def test_speed_is_near_that_of_measured_runs(key):
    config, plan, gpus = config_of(key)
    time = step_time(config, plan, peak=GPUS["h200"][1], node_size=gpus)
    speed = config.data.seq_len * config.engine.accumulation_steps / time.total
    assert speed == pytest.approx(RUNS[key]["tokens/s"], rel=0.1)


class Live(TorchDispatchMode):
    """Bytes of the tensors that were made in it and are still held, other than those of `model`."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.weights:
                    self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def held(self) -> int:
        return sum(size for ref, size in self.made.values() if not ref.expired())


def test_what_is_kept_with_recomputation_is_what_is_counted():
    """Of two more layers, so that what is not of layers does not count."""
    held = []
    # The first leaves behind what is remembered of masks and schedules.
    for layers in (2, 2, 4):
        config = replace(MODEL, num_layers=layers)
        model = Transformer(config, kernel="reference", activation_checkpointing=True)
        ((batch,),) = full_step(0, dp=1, accumulation=1)
        with Live(model) as live:
            loss = model(batch)
            held.append(live.held())
        del loss
    engine = EngineConfig(activation_checkpointing=True, dtype="fp32", zero_stage=0, micro_batch_size=2)
    counted = [rank_memory(replace(MODEL, num_layers=n), engine, ParallelPlan(dp=1), 48).activations for n in (2, 4)]
    assert held[2] - held[1] == counted[1] - counted[0]


def test_what_is_offloaded_is_what_is_counted():
    """On the host what the layers keep, without what is left empty of pages; on the device that of two layers."""
    config = replace(MODEL, num_layers=5)
    model = Transformer(config, kernel="reference", activation_checkpointing=True, activation_offload=True)
    ((batch,),) = full_step(0, dp=1, accumulation=1)
    kept: list[KeptLayer] = []
    made = ActivationOffload.layer

    def making(self, *args):
        kept.append(made(self, *args))
        return kept[-1]

    with mock.patch.object(ActivationOffload, "layer", making):
        loss = model(batch)
    tensors = [t for layer in kept for t in layer._tensors]
    engine = EngineConfig(
        activation_checkpointing=True, activation_offload=True, dtype="fp32", zero_stage=0, micro_batch_size=2
    )
    memory = rank_memory(config, engine, ParallelPlan(dp=1), 48)
    assert memory.host == sum(t.like.nbytes for t in tensors)
    assert memory.activations == sum(t.here.nbytes for t in tensors if t.here is not None)
    assert memory.activations == LAYERS_HELD / 5 * memory.host
    del loss


def test_every_plan_can_be_run_and_is_what_its_flags_say():
    config = load_config(EIGHT_B, ["--data.seq_len=64k", "--data.tokenizer=bytes"])
    found = candidates(config, 8, peak=GPUS["h100"][1], node_size=8, tokens=1 << 19)
    assert len({c.plan for c in found}) > 20
    for c in found[::7]:
        assert c.plan.world_size == 8
        assert c.tokens_per_step == pytest.approx(1 << 19, rel=0.01)
        again = load_config(EIGHT_B, ["--data.seq_len=64k", *c.flags.split()])
        assert not again.check(8, 8)
        assert again.engine == c.config.engine
        assert again.parallel.resolve(8) == c.plan
    speeds = [c.speed for c in found]
    assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize(
    "words",
    [
        ["--parallel.ring=1", "--parallel.context=4"],
        ["--parallel.dp=2", "--parallel.ring=4", "--parallel.grad_dtype=bf16"],
        ["--parallel.ring=1", "--parallel.ulysses=8", "--parallel.ulysses_chunks=4"],
        ["--engine.offload=all"],
    ],
    ids=["context", "dp_grad_dtype", "chunks", "offload"],
)
def test_flags_undo_what_a_configuration_says_that_would_not_go_with_the_plan(words):
    words = ["--data.seq_len=64k", *words]
    config = load_config(EIGHT_B, words)
    found = candidates(config, 8, peak=GPUS["h100"][1], node_size=8, tokens=1 << 19)
    assert found
    for c in found[::5]:
        again = load_config(EIGHT_B, [*words, *c.flags.split()])
        assert not again.check(8, 8)
        assert again.engine == c.config.engine
        assert again.engine.offload == config.engine.offload
        assert again.parallel.resolve(8) == c.plan


def test_more_gpus_more_memory_and_recomputation_do_what_they_should():
    config = load_config(EIGHT_B, [])

    def total(plan: ParallelPlan, world: int = 8, seq_len: int = 1 << 17, **engine) -> int:
        return rank_memory(config.model, replace(config.engine, **engine), plan.resolve(world), seq_len).total

    ring = ParallelPlan(ring=8)
    assert total(ring, activation_checkpointing=False) > total(ring)
    assert total(ring, zero_stage=1) > total(ring, zero_stage=2) > total(ring, zero_stage=3)
    assert total(ring, offload="all") < total(ring)
    assert total(ring, seq_len=1 << 18) > total(ring) > total(ParallelPlan(ring=16), 16)
    norms = ParallelPlan(tp=8, shard_norms=True)
    assert total(norms, zero_stage=1) < total(ParallelPlan(tp=8), zero_stage=1)
    assert total(ring, activation_offload=True) < total(ring)
    # Five temporaries as wide as the SwiGLU, of 4k tokens instead of 128k; more than the sums of the weights' gradients take.
    assert total(ring, mlp_chunk_tokens=4096, seq_len=1 << 20) < total(ring, seq_len=1 << 20)
    kept = {"activation_checkpointing": False}
    assert total(ring, mlp_chunk_tokens=4096, **kept) < total(ring, **kept)
    # More micro-batches are in flight in the first of several stages.
    stages = ParallelPlan(pp=4, ring=2)
    assert total(stages, zero_stage=1, accumulation_steps=4) > total(stages, zero_stage=1, accumulation_steps=1)


def test_copies_to_the_host_hide_behind_long_attention(monkeypatch):
    """What is copied grows with the tokens, attention with their square. At the speed of today's buses products alone are
    enough for this model."""

    def waiting(length: str, **plan: int) -> float:
        found = []
        for offload in (False, True):
            words = [
                f"--engine.activation_offload={offload}".lower(),
                f"--data.seq_len={length}",
                "--engine.zero_stage=1",
            ]
            config = load_config(EIGHT_B, words)
            ring = ParallelPlan(ring=8 // plan.get("pp", 1), **plan).resolve(8)
            found.append(step_time(config, ring, peak=GPUS["h100"][1], node_size=8).messages)
        return found[1] - found[0]

    assert waiting("16k") == 0
    monkeypatch.setattr(step_time_module, "HOST_BYTES", 5e9)
    assert waiting("16k") > 0
    assert waiting("1M") == 0
    # But for the layer that a pipeline goes back through first.
    assert waiting("1M", pp=2) > 0


def test_the_longest_sequence_fits_and_the_next_does_not():
    limit = USABLE * GPUS["h100"][0]
    config = load_config(EIGHT_B, [])
    for c in candidates(config, 8, peak=GPUS["h100"][1], node_size=8, tokens=1 << 19)[:3]:
        most = longest(c, limit, 8)
        for length, fits in ((most, True), (most + 1024, False)):
            assert (rank_memory(config.model, c.config.engine, c.plan, length).total <= limit) == fits


def answer(*words: str) -> str:
    args, overrides = parser().parse_known_args(words)
    return run(args, overrides)


def test_the_answer_names_a_plan_and_says_why():
    text = answer("--config", EIGHT_B, "--world-size", "8", "--top", "4", "--longest")
    rows = text.splitlines()
    assert re.match(r"\d+ plans are possible, \d+ fit; one causal document", rows[1])
    assert rows[2].split()[-1] == "longest"
    assert len(rows) == 3 + 4 + 2
    assert all(float(row.split()[8]) <= USABLE * GPUS["h100"][0] / GIB for row in rows[3:7])
    assert rows[7].startswith("take the first: ")
    assert "memory: mostly" in rows[7]
    dp, pp, ring, uly, tp = (int(word.rstrip("n")) for word in rows[3].split()[:5])
    plan = load_config(EIGHT_B, rows[8].split()).parallel.resolve(8)
    assert (plan.dp, plan.pp, plan.ring, plan.ulysses, plan.tp) == (dp, pp, ring, uly, tp)


def test_on_two_machines_no_exchange_of_heads_crosses():
    config = load_config(EIGHT_B, [])
    found = candidates(config, 16, peak=GPUS["h100"][1], node_size=4, tokens=1 << 19)
    assert found
    assert all(4 % (c.plan.ulysses * c.plan.tp) == 0 for c in found)


def test_what_does_not_fit_or_is_not_known_is_said(capsys):
    text = answer("--config", EIGHT_B, "--world-size", "1", "--gpu", "a100-40")
    assert "nothing fits: even the plan above needs" in text
    assert "--engine.activation_offload=true" in text
    assert main(["plan", "--config", EIGHT_B, "--world-size", "8", "--gpu", "h1000"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["plan", "--world-size", "7", "--data.seq_len=4"]) == 0  # dp takes all seven
    assert main(["plan", "--world-size", "0"]) == 2
    assert main(["plan", "--world-size", "2", "--model.hiden_size=3"]) == 2
    assert "hidden_size" in capsys.readouterr().err
    assert parse_size("1M") == 1 << 20
