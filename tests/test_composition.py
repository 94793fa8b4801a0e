"""Attention over ranks inside other people's machinery: torch.compile, FSDP2, and two meshes in one process."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from train_cases import MODEL, SEQ_LEN, full_step, reference_model, relative_error

from longctx.attention import ParallelAttention
from longctx.engine import scaled_loss
from longctx.functional import attention
from longctx.masks import Causal, Documents, SlidingWindow
from longctx.model import DecoderLayer, Transformer
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.parity import reference_backward, shard_step
from longctx.rope import rope_cos_sin, rope_frequencies
from longctx.sequence import SequenceMeta
from longctx.testing import run_distributed

TIMEOUT = timedelta(seconds=60)


def make_mesh(**degrees: int) -> ParallelMesh:
    return ParallelMesh.create(ParallelPlan(**degrees), device="cpu", timeout=TIMEOUT)


def meta_of(mesh: ParallelMesh, mask=None) -> SequenceMeta:
    return SequenceMeta.of(
        SEQ_LEN,
        mask=mask,
        ring_rank=mesh.ring.rank,
        ring_world=mesh.ring.size,
        ulysses_rank=mesh.ulysses.rank,
        ulysses_world=mesh.ulysses.size,
    )


def noted(mesh: ParallelMesh) -> list[str]:
    """Every message of the mesh from now on, in order."""
    said: list[str] = []
    post = mesh.journal.post

    def remembering(*args, **settings):
        message = post(*args, **settings)
        said.append(str(message))
        return message

    mesh.journal.post = remembering
    return said


# ---- torch.compile


def block_pass(block: nn.Module, mesh: ParallelMesh, mask, seed: int) -> list[torch.Tensor]:
    """Output and gradients of one pass through the blocks."""
    meta = meta_of(mesh, mask)
    generator = torch.Generator().manual_seed(seed)
    x = meta.shard(torch.randn(2, SEQ_LEN, MODEL.hidden_size, generator=generator)).requires_grad_()
    inv_freq, factor = rope_frequencies(MODEL.head_size, MODEL.rope_theta, None, device=x.device)
    cos, sin = rope_cos_sin(meta.positions, inv_freq, attention_factor=factor, dtype=torch.float32)
    out = x
    for layer in block:
        out = layer(out, cos, sin, meta)
    grads = torch.autograd.grad((out * out).sum(), [x, *block.parameters()])
    return [out.detach(), *grads]


def compile_worker(rank: int, degrees: dict[str, int], backend: str) -> dict:
    mesh = make_mesh(**degrees)
    torch.manual_seed(0)
    blocks = nn.ModuleList(DecoderLayer(MODEL, mesh.for_layer(i), "reference", "off") for i in range(2))
    for p in blocks.parameters():
        nn.init.normal_(p, std=0.2)
    said = noted(mesh)
    compiled = nn.ModuleList(torch.compile(block, backend=backend) for block in blocks)
    # The second window leaves hops out: other messages from the same compiled code.
    masks = (Documents((0, 7, 29, SEQ_LEN)) & Causal(), SlidingWindow(5) & Causal())
    worst, orders = 0.0, []
    for seed, mask in enumerate(masks):
        eager = block_pass(blocks, mesh, mask, seed)
        middle = len(said)
        for a, b in zip(block_pass(compiled, mesh, mask, seed), eager, strict=True):
            worst = max(worst, relative_error(a, b))
        orders.append((said[:middle], said[middle:]))
        said.clear()
    frames = sum(torch._dynamo.utils.counters["frames"].values())
    return {"worst": worst, "orders": orders, "frames": frames}


@pytest.mark.parametrize(
    "degrees", [{"ring": 2}, {"ulysses": 2, "ulysses_chunks": 2}, {}], ids=["ring2", "ulysses2", "one_process"]
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_block_agrees_and_sends_the_same_messages_in_the_same_order(degrees):
    world = degrees.get("ring", 1) * degrees.get("ulysses", 1)
    for found in run_distributed(compile_worker, degrees, "aot_eager", world=world):
        assert found["worst"] < 1e-6
        assert found["frames"] > 0, "nothing was compiled"
        for eager, compiled in found["orders"]:
            assert compiled == eager
            assert bool(eager) == (world > 1)


# ---- FSDP2


def fsdp_worker(rank: int, degrees: dict[str, int], broken: bool) -> dict[str, float]:
    mesh = make_mesh(**degrees)
    everyone = init_device_mesh("cpu", (mesh.world_size,))
    model = Transformer(MODEL, mesh=mesh, kernel="reference", activation_checkpointing=True, seed=0)
    for layer in model.model.layers:
        fully_shard(layer, mesh=everyone)
    fully_shard(model, mesh=everyone)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    full = full_step(0, dp=mesh.dp.size, accumulation=1)
    (batch,) = shard_step(full, mesh)
    # FSDP averages over all ranks, as DeepSpeed does: one rule.
    loss = scaled_loss(
        model(batch),
        num_target_tokens=batch.num_target_tokens,
        grad_world=1 if broken else mesh.grad.size,
        accumulation_steps=1,
    )
    loss.backward()
    reference = reference_model()
    reference_backward(reference, full)
    expected = dict(reference.named_parameters())
    return {name: relative_error(p.grad.full_tensor(), expected[name].grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("degrees", [{"ring": 2}, {"ulysses": 2}], ids=["ring2", "ulysses2"])
def test_fsdp2_around_a_model_gives_the_gradients_of_one_process(degrees):
    for errors in run_distributed(fsdp_worker, degrees, False, world=2):
        assert max(errors.values()) < 1e-5, errors


def test_fsdp2_without_the_gradient_rule_is_caught():
    for errors in run_distributed(fsdp_worker, {"ring": 2}, True, world=2):
        assert min(errors.values()) > 0.1


# ---- two meshes in one process


def meshes_worker(rank: int) -> dict[str, float]:
    """Two attentions over different ranks, their passes interleaved: forward a, b, backward a, b, and the other way round."""
    meshes = {
        "ring4": make_mesh(ring=4),
        "ring2_ulysses2": make_mesh(ring=2, ulysses=2),
        "dp2_ring2": make_mesh(ring=2),
    }
    masks = {"ring4": Causal(), "ring2_ulysses2": Documents((0, 7, 29, SEQ_LEN)) & Causal(), "dp2_ring2": Causal()}
    errors = {}
    for order in (list(meshes), list(meshes)[::-1]):
        outs = {}
        for number, name in enumerate(order):
            mesh, mask = meshes[name], masks[name]
            meta = meta_of(mesh, mask)
            generator = torch.Generator().manual_seed(number)
            whole = [torch.randn(1, SEQ_LEN, h, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2, 4)]
            exact = [x.requires_grad_() for x in whole[:3]]
            expected = attention(*exact, mask=mask, kernel="reference")
            expected_grads = torch.autograd.grad(expected, exact, whole[3])
            shards = [meta.shard(x.detach()).requires_grad_() for x in whole[:3]]
            out = ParallelAttention(mesh, kernel="reference", layer=number)(*shards, meta)
            outs[name] = (out, shards, meta, whole[3], expected, expected_grads)
        for name in order:
            out, shards, meta, dout, expected, expected_grads = outs[name]
            grads = torch.autograd.grad(out, shards, meta.shard(dout))
            pairs = [(out, expected), *zip(grads, expected_grads, strict=True)]
            errors[f"{name} {order[0]} first"] = max(relative_error(a, meta.shard(b)) for a, b in pairs)
    journals = {id(mesh.journal) for mesh in meshes.values()}
    assert len(journals) == len(meshes)
    return errors


def test_meshes_of_one_process_do_not_disturb_each_other():
    for errors in run_distributed(meshes_worker, world=4):
        assert len(errors) == 6
        assert max(errors.values()) < 1e-12, errors
