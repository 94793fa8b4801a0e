"""Plans of every axis, each trained some steps and held against one process. Run by the processes of a plan."""

from __future__ import annotations

import gc
import math
import random
import re
from dataclasses import dataclass, replace

import torch
from train_cases import MODEL, SEQ_LEN, ReferenceTrainer, full_step, relative_error

from longctx.engine import EngineConfig, build_engine
from longctx.errors import LongCtxError, Problem
from longctx.layout import layout_names
from longctx.model import ModelConfig
from longctx.optim import OptimConfig
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parity import FullStep, ParityCase, make_step, reference_backward, shard_step

STEPS = 5
TOLERANCE = 1e-5
# Four query and four key heads, so that tp 2 and ulysses 2 both divide them; three layers, so that stages are uneven.
WIDE = replace(MODEL, num_kv_heads=4, num_layers=3)
# A large eps: Adam would otherwise turn a gradient near 0 and its rounding into steps of one size.
OPTIM = OptimConfig(lr=1e-2, warmup_steps=1, eps=1e-4, gradient_clipping=0.5)


@dataclass(frozen=True, kw_only=True)
class PlanCase:
    """One plan and how it is trained.

    Args:
        host: what is kept for the recomputation lies in the host's memory.
        mlp_tokens: of a piece of the SwiGLU.
    """

    dp: int = 1
    pp: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    zero: int = 1
    accumulation: int = 1
    tied: bool = False
    recompute: bool = False
    host: bool = False
    mlp_tokens: int | None = None
    rich: bool = False
    shard_norms: bool = False
    dual: bool = False
    offload: str = "none"
    dtype: str = "fp32"
    layers: int = 3
    layout: str = "zigzag"
    seq_len: int = SEQ_LEN
    steps: int = STEPS

    @property
    def plan(self) -> ParallelPlan:
        degrees = {axis: getattr(self, axis) for axis in ("dp", "pp", "ring", "ulysses", "tp")}
        schedule = "dualpipev" if self.dual else "1f1b"
        return ParallelPlan(**degrees, layout=self.layout, shard_norms=self.shard_norms, schedule=schedule)

    @property
    def model(self) -> ModelConfig:
        made = replace(WIDE, tie_embeddings=self.tied, num_layers=self.layers)
        rich = {"qkv_bias": True, "qk_norm": True, "sliding_window": 20, "softcap": 5.0, "sinks": True}
        return replace(made, **rich) if self.rich else made

    @property
    def world(self) -> tuple[int, int, int]:
        """What DeepSpeed knows of a plan: cases that agree in it can share their processes."""
        return (self.pp, self.dp * self.ring * self.ulysses, self.tp)

    def __str__(self) -> str:
        degrees = [f"{axis}{n}" for axis in ("dp", "pp", "ring", "ulysses", "tp") if (n := getattr(self, axis)) > 1]
        words = [f"zero{self.zero}", f"accumulate{self.accumulation}"]
        words += [name for name in ("tied", "recompute", "host", "rich", "shard_norms", "dual") if getattr(self, name)]
        words += [self.layout] * (self.layout != "zigzag") + [f"tokens{self.seq_len}"] * (self.seq_len != SEQ_LEN)
        words += [] if self.mlp_tokens is None else [f"mlp{self.mlp_tokens}"]
        words += [f"offload_{self.offload}"] * (self.offload != "none") + [self.dtype] * (self.dtype != "fp32")
        return "-".join((degrees or ["one"]) + words)


def train_plans(rank: int, cases: list[PlanCase]) -> dict[str, dict[str, float]]:
    """For each case, on rank 0 the relative errors of losses, norms and parameters after all steps, worst first."""
    return {str(case): errors(case) for case in cases}


def errors(case: PlanCase) -> dict[str, float]:
    settings = EngineConfig(
        zero_stage=case.zero,
        dtype=case.dtype,
        offload=case.offload,
        micro_batch_size=2,
        accumulation_steps=case.accumulation,
        activation_checkpointing=case.recompute,
        activation_offload=case.host,
        mlp_chunk_tokens=case.mlp_tokens,
        zero3_keep_elements=0,
        kernel="reference",
    )
    mesh = make_mesh(case.plan)
    # The last rank of the last replica has no target.
    last = (mesh.ring.size - 1, mesh.ring.size, mesh.ulysses.size - 1, mesh.ulysses.size)
    starved = (mesh.dp.size - 1, *last) if mesh.grad.size > 1 else None
    steps = [
        full_step(n, dp=case.dp, accumulation=case.accumulation, starved=starved, seq_len=case.seq_len)
        for n in range(case.steps)
    ]
    return train_beside_one_process(mesh, case.model, settings, steps, case.seq_len)


def make_mesh(plan: ParallelPlan) -> ParallelMesh:
    # DeepSpeed collects garbage whenever it starts; what was imported is none, and looking through it takes 0.3 s.
    gc.freeze()
    return ParallelMesh.create(plan, device="cpu")


def train_beside_one_process(
    mesh: ParallelMesh, model: ModelConfig, settings: EngineConfig, steps: list[FullStep], seq_len: int
) -> dict[str, float]:
    """Train all steps, evaluate the first, gather the parameters. On rank 0: how far each number is from one process's."""
    engine = build_engine(model, settings, OPTIM, mesh, total_steps=len(steps), seq_len=seq_len, seed=0)
    results = [engine.train_step(n, shard_step(full, mesh)) for n, full in enumerate(steps)]
    evaluated = engine.evaluate(shard_step(steps[0], mesh))
    state = engine.full_state_dict()
    assert bool(state) == (mesh.rank == 0)
    if mesh.rank:
        return {}
    reference = ReferenceTrainer(OPTIM, total_steps=len(steps), config=model)
    found: dict[str, float] = {}

    def note(name: str, got: float, expected: float) -> None:
        found[name] = max(found.get(name, 0.0), abs(got - expected) / abs(expected))

    for n, (full, result) in enumerate(zip(steps, results, strict=True)):
        loss, norm = reference.step(n, full)
        note("loss", result.loss, loss)
        note("grad_norm", result.grad_norm, norm)
    note("evaluated", evaluated, reference_backward(reference.model, steps[0]))
    # A key's bias has next to no gradient: all of a layer's biases are one vector.
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, parameter in reference.model.named_parameters():
        together = re.sub(r"[qkv]_proj\.bias", "biases", name)
        pairs.setdefault(together, []).append((state.pop(name).flatten(), parameter.detach().flatten()))
    for name, of_name in pairs.items():
        found[name] = relative_error(*(torch.cat(tensors) for tensors in zip(*of_name, strict=True)))
    assert not state, f"the engine has more parameters: {list(state)}"
    return dict(sorted(found.items(), key=lambda item: -item[1]))


# ---- any plan


@dataclass(frozen=True, kw_only=True)
class RandomCase:
    """A plan, a model and a length that nobody chose to fit together."""

    plan: ParallelPlan
    model: ModelConfig
    engine: EngineConfig
    seq_len: int
    mask_documents: bool
    seed: int

    @property
    def world(self) -> tuple[int, int, int]:
        return (self.plan.pp, self.plan.grad_world, self.plan.tp)

    def problems(self) -> list[Problem]:
        """What a run of this case would be refused for before it starts."""
        model = self.model
        found = [*model.problems(), *self.engine.problems("cpu"), *self.engine.plan_problems(self.plan)]
        return found + self.plan.check(
            num_heads=model.num_heads,
            num_kv_heads=model.kv_heads,
            seq_len=self.seq_len,
            num_layers=model.num_layers,
            mlp_size=model.mlp_size,
            vocab_size=model.vocab_size,
        )


def draw_case(seed: int, max_world: int) -> RandomCase:
    """The case of a seed: degrees whose product is at most `max_world`, sizes that are often awkward for them."""
    draw = random.Random(seed)
    degrees = dict.fromkeys(("dp", "pp", "ring", "ulysses", "tp"), 1)
    for axis in draw.sample(list(degrees), draw.randint(1, 3)):
        left = max_world // math.prod(degrees.values())
        degrees[axis] = draw.choice([n for n in (2, 2, 2, 3, 4) if n <= left] or [1])
    num_heads, num_kv_heads = draw.choice([(4, 4), (4, 2), (4, 1), (8, 4), (6, 3), (12, 4)])
    model = ModelConfig(
        vocab_size=draw.choice([60, 64, 64, 65]),
        hidden_size=48,
        num_layers=draw.randint(1, 4),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        intermediate_size=draw.choice([48, 48, 52]),
        tie_embeddings=draw.random() < 0.5,
        qkv_bias=draw.random() < 0.3,
        qk_norm=draw.random() < 0.3,
        sliding_window=draw.choice([None, None, 5]),
        init_std=0.2,
    )
    engine = EngineConfig(
        zero_stage=draw.choice([0, 1, 1, 2, 3]),
        dtype="fp32",
        micro_batch_size=draw.randint(1, 2),
        accumulation_steps=draw.randint(1, 4),
        activation_checkpointing=draw.random() < 0.5,
        zero3_keep_elements=draw.choice([0, 0, 500]),
        kernel="reference",
    )
    layout = draw.choice(layout_names())
    plan = ParallelPlan(**degrees, layout=layout, shard_norms=degrees["tp"] > 1 and draw.random() < 0.5)
    model = replace(model, softcap=draw.choice([0.0, 0.0, 3.0]), sinks=draw.random() < 0.3)
    multiple = plan.seq_multiple
    seq_len = draw.choice([multiple * draw.randint(1, 6), multiple * draw.randint(1, 6), draw.randint(1, 64)])
    mask_documents = draw.random() < 0.5
    # Without checkpointing it is refused.
    offload = draw.random() < (0.5 if engine.activation_checkpointing else 0.05)
    engine = replace(engine, activation_offload=offload, mlp_chunk_tokens=draw.choice([None, None, 1, 5, 1000]))
    return RandomCase(plan=plan, model=model, engine=engine, seq_len=seq_len, mask_documents=mask_documents, seed=seed)


def train_random(rank: int, cases: list[RandomCase]) -> dict[int, dict[str, float] | str]:
    """For each case by its seed: as `train_plans`, two steps each; or the message it was refused with."""
    found: dict[int, dict[str, float] | str] = {}
    for case in cases:
        mesh = make_mesh(case.plan)
        parity = ParityCase(
            model=case.model,
            engine=case.engine,
            optim=OPTIM,
            plan=case.plan,
            seq_len=case.seq_len,
            mask_documents=case.mask_documents,
        )
        steps = [make_step(replace(parity, seed=100 * case.seed + n), torch.device("cpu")) for n in range(2)]
        try:
            found[case.seed] = train_beside_one_process(mesh, case.model, case.engine, steps, case.seq_len)
        except LongCtxError as error:
            found[case.seed] = str(error)
    return found
