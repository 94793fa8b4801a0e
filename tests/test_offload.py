"""Activations in the host's memory: what is computed stays the same, bit for bit, whenever the copies are really made."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from model_cases import DOCUMENTS, SIZES, Batch, CountOps, gradients, make_batch

from longctx import offload as offload_module
from longctx.errors import ConfigError, LongCtxError
from longctx.masks import Causal
from longctx.model import DecoderLayer, ModelConfig, Transformer
from longctx.offload import LAYERS_HELD, ActivationOffload, KeptLayer, Lane
from longctx.parallel.ring import RING_ATTENTION_OP

LAYERS = 5
CONFIG = ModelConfig(**{**SIZES, "num_layers": LAYERS}, qk_norm=True, qkv_bias=True, tie_embeddings=True)
BATCH = make_batch(DOCUMENTS & Causal())


def offloaded(config: ModelConfig = CONFIG) -> Transformer:
    return Transformer(config, activation_checkpointing=True, activation_offload=True)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return gradients(Transformer(CONFIG, activation_checkpointing=True), BATCH)


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(found[name], value) for name, value in expected.items())


# ---- copies that are made as late as streams allow


@dataclass
class Late:
    """An event of a `LateLane`: the copy, and what comes before it."""

    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    before: Late | None
    is_done: bool = False

    def happen(self) -> None:
        if not self.is_done:
            self.is_done = True
            if self.before is not None:
                self.before.happen()
            for into, source in self.pairs:
                into.copy_(source)


class LateLane(Lane):
    """A lane whose copies are made when compute waits for them, and not before."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.last: Late | None = None

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        self.last = Late(list(pairs), self.last)
        return self.last

    def join(self, event: Any) -> None:
        if event is not None:
            event.happen()


@pytest.fixture
def reused(monkeypatch):
    """Memory that was let go is written to at once, and memory that is fetched into is not zero before."""
    leave, fetch, empty = KeptLayer.leave, KeptLayer.fetch, torch.empty_like

    def leaving(self: KeptLayer) -> None:
        held = [kept.here for kept in self._tensors if kept.here is not None and kept.pages]
        leave(self)
        for x in held:
            x.fill_(float("nan"))

    def poisoned(*args: Any, **settings: Any) -> torch.Tensor:
        x = empty(*args, **settings)
        return x if x.is_meta else x.fill_(float("nan"))

    def fetching(self: KeptLayer) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(offload_module.torch, "empty_like", poisoned)
            fetch(self)

    monkeypatch.setattr(KeptLayer, "leave", leaving)
    monkeypatch.setattr(KeptLayer, "fetch", fetching)


def three_steps(monkeypatch, lane: type[Lane]) -> list[dict[str, torch.Tensor]]:
    """Pages of one step serve the next; a second batch shows whether they hold what they should."""
    monkeypatch.setattr(offload_module, "Lane", lane)
    model = offloaded()
    other = make_batch(Causal())
    return [gradients(model, batch) for batch in (BATCH, other, BATCH)]


@pytest.mark.parametrize("lane", [Lane, LateLane], ids=["early", "late"])
def test_is_exact_whenever_copies_are_made(monkeypatch, reused, expected, lane):
    first, second, third = three_steps(monkeypatch, lane)
    assert equal(first, expected)
    assert equal(third, expected)
    assert equal(second, gradients(Transformer(CONFIG, activation_checkpointing=True), make_batch(Causal())))


@pytest.mark.parametrize("broken", ["out", "into"])
def test_a_missing_wait_is_caught(monkeypatch, reused, expected, broken):
    """Broken twins, in which compute does not wait for the copies of one of the two lanes."""
    make = offload_module.ActivationOffload.layer

    def breaking(self: ActivationOffload, *args: Any) -> KeptLayer:
        layer = make(self, *args)
        getattr(self, broken).join = lambda event: None
        return layer

    monkeypatch.setattr(offload_module.ActivationOffload, "layer", breaking)
    assert not all(equal(found, expected) for found in three_steps(monkeypatch, LateLane)[::2])


def test_what_leaves_while_it_is_used_is_caught(monkeypatch, reused, expected):
    """A broken twin: results of attention leave as soon as they are there."""
    keep = KeptLayer.keep

    def at_once(self: KeptLayer, results: Any) -> None:
        keep(self, results)
        self.leave()

    monkeypatch.setattr(KeptLayer, "keep", at_once)
    assert not equal(gradients(offloaded(), BATCH), expected)


# ---- what is where, and when


@pytest.fixture
def watched(monkeypatch) -> list[tuple[str, int]]:
    """(what, layer) in the order it happens: "compute" (in backward again), "fetch", and "held" with how many layers hold
    something on the device."""
    said: list[tuple[str, int]] = []
    kept: list[KeptLayer] = []
    forward, fetch, make = DecoderLayer.forward, KeptLayer.fetch, KeptLayer.__init__

    def making(self: KeptLayer, *args: Any) -> None:
        make(self, *args)
        kept.append(self)

    def computing(self: DecoderLayer, *args: Any) -> torch.Tensor:
        said.append(("compute", self.number))  # type: ignore[arg-type]
        said.append(("held", sum(any(t.here is not None and t.here.numel() for t in layer._tensors) for layer in kept)))
        return forward(self, *args)

    def fetching(self: KeptLayer) -> None:
        if any(t.pages and t.here is None for t in self._tensors):
            said.append(("fetch", kept.index(self) % LAYERS))
        fetch(self)

    monkeypatch.setattr(KeptLayer, "__init__", making)
    monkeypatch.setattr(DecoderLayer, "forward", computing)
    monkeypatch.setattr(KeptLayer, "fetch", fetching)
    return said


def test_a_layer_is_fetched_while_the_one_behind_it_goes_back(watched):
    model = offloaded()
    for number, layer in enumerate(model.model.layers):
        layer.number = number
    gradients(model, BATCH)
    assert [event for event in watched if event[0] != "held"] == [
        *(("compute", i) for i in range(5)),
        ("compute", 4),
        # Before layer 3 is computed again the fetch of layer 2 is begun; 4 and 3 never left.
        ("fetch", 2),
        ("compute", 3),
        ("fetch", 1),
        ("compute", 2),
        ("fetch", 0),
        ("compute", 1),
        ("compute", 0),
    ]
    assert max(count for what, count in watched if what == "held") == LAYERS_HELD


def test_everything_is_moved_and_nothing_stays(expected):
    model = offloaded()
    assert model.offload.host_bytes == 0
    pages = []
    for _ in range(3):
        model.zero_grad()
        loss = model(BATCH)
        held = list(model.offload._held)
        # The input, out and lse of every layer, in a page each.
        assert model.offload.host_bytes == 3 * LAYERS * model.offload.pages.page_bytes
        loss.backward()
        assert model.offload.host_bytes == 0
        assert all(t.here is None and not t.pages for layer in held for t in layer._tensors)
        pages.append(model.offload.pages.made)
    assert pages == [3 * LAYERS] * 3, "pages are used again"


def test_attention_is_not_computed_again():
    with CountOps(RING_ATTENTION_OP) as attention:
        gradients(offloaded(), BATCH)
    assert attention.calls == LAYERS


def test_micro_batches_under_way_are_chains_of_their_own(expected):
    """As in a pipeline: forward, forward, backward, forward, backward, backward."""
    other = make_batch(Causal())
    plain = Transformer(CONFIG, activation_checkpointing=True)
    for batch in (BATCH, other, other):
        plain(batch).backward()
    model = offloaded()
    losses = [model(BATCH), model(other)]
    losses.pop(0).backward()
    losses.append(model(other))
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert model.offload.host_bytes == 0


def test_tensors_larger_than_a_page_are_on_several(monkeypatch, expected):
    monkeypatch.setattr(offload_module, "PAGE_BYTES_ELSEWHERE", 1000)
    model = offloaded()
    assert equal(gradients(model, BATCH), expected)
    # 2 x 24 tokens: x of 32 numbers, out of 32, lse of 4.
    assert model.offload.pages.made == LAYERS * (7 + 7 + 1)


def test_a_dropped_graph_gives_its_pages_back(expected):
    model = offloaded()
    loss = model(BATCH)
    del loss
    for _ in range(2):
        assert equal(gradients(model, BATCH), expected)
    gc.collect()
    assert model.offload.host_bytes == 0
    # Until the second layer of the next step the last two of the dropped one hold on to theirs.
    assert model.offload.pages.made <= 3 * (LAYERS + LAYERS_HELD)


def test_an_abandoned_backward_pass_is_waited_for(monkeypatch, reused, expected):
    """What was being fetched for it is not let go before it has come."""
    monkeypatch.setattr(offload_module, "Lane", LateLane)
    model = offloaded()
    loss = model(BATCH)
    handle = model.model.layers[2].mlp.down_proj.weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()
    coming = model.offload._coming
    assert coming is not None
    assert not coming.arrived.is_done
    assert all(kept.here is not None for kept in coming._tensors)
    del loss
    assert equal(gradients(model, BATCH), expected)
    assert coming.arrived.is_done


def test_a_second_backward_is_refused():
    model = offloaded()
    loss = model(BATCH)
    loss.backward(retain_graph=True)
    with pytest.raises(LongCtxError, match="compute the loss again"):
        loss.backward()


def test_evaluation_moves_nothing():
    model = offloaded()
    with torch.no_grad():
        model(BATCH)
    assert model.offload.device is None
    assert model.offload.host_bytes == 0


def test_without_checkpointing_it_is_refused():
    with pytest.raises(ConfigError, match="set activation_checkpointing=True too"):
        Transformer(CONFIG, activation_offload=True)


def test_a_single_token_is_moved_too():
    one = make_batch(Causal(), length=1)
    assert equal(gradients(offloaded(), one), gradients(Transformer(CONFIG, activation_checkpointing=True), one))


# ---- on a GPU


def on_gpu(batch: Batch) -> Batch:
    return Batch(batch.tokens.cuda(), batch.labels.cuda(), batch.meta.to("cuda"))


LARGE = ModelConfig(vocab_size=1024, hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=2, intermediate_size=1024)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_cuda_is_exact_and_never_waits_for_the_device():
    batch = on_gpu(make_batch(Causal(), length=4096, vocab=1024))
    results = []
    for offload in (False, False, True):
        model = Transformer(LARGE, kernel="triton", activation_checkpointing=True, activation_offload=offload)
        model.cuda().bfloat16()
        gradients(model, batch)  # compiles, copies the schedule, pins pages
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                found = gradients(model, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append({name: value.clone() for name, value in found.items()})
    assert model.offload.host_bytes == 0
    # What adds atomically is not even equal to itself; the layers' parameters are.
    certain = [name for name, value in results[0].items() if torch.equal(results[1][name], value)]
    assert len(certain) >= len(results[0]) - 3
    assert all(torch.equal(results[2][name], results[0][name]) for name in certain)


@pytest.mark.gpu
def test_cuda_pins_once_however_far_the_host_runs_ahead():
    batch = on_gpu(make_batch(Causal(), length=4096, vocab=1024))
    model = Transformer(LARGE, activation_checkpointing=True, activation_offload=True).cuda().bfloat16()
    gradients(model, batch)
    made = model.offload.pages.made
    for _ in range(4):
        torch.cuda._sleep(200_000_000)  # the device is behind by a tenth of a second
        gradients(model, batch)
    assert model.offload.pages.made == made


@pytest.mark.gpu
def test_cuda_holds_two_layers():
    """What the device no longer holds is what the estimate says, though the host is far ahead of the device."""
    length, config = 32768, LARGE
    batch = on_gpu(make_batch(Causal(), length=length, vocab=1024))
    peaks = []
    for offload in (False, True):
        model = Transformer(config, activation_checkpointing=True, activation_offload=offload).cuda().bfloat16()
        gradients(model, batch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda._sleep(200_000_000)
        gradients(model, batch)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model
    # bf16 input and out, fp32 lse.
    of_layer = 2 * length * (2 * 2 * config.hidden_size + 4 * config.num_heads)
    assert peaks[0] - peaks[1] == pytest.approx((config.num_layers - LAYERS_HELD) * of_layer, rel=0.1)
