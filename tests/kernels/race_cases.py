"""The Hopper kernels under Triton's concurrency sanitizer, which holds every access to shared memory against the barriers.

The sanitizer is chosen when a kernel is compiled, so each case is a process of its own: this file as a script, with a case as
JSON. A race ends it with a device-side assertion that names it.

Triton 3.6's sanitizer knows warp specialisation, mbarriers, TMA loads and stores and wgmma. What it does not know is put in a
form that it does, in copies of the kernels' source:

* signals, which are named barriers, become mbarriers (`race_signals`), and the named barrier at which the warpgroups meet two
  signals: each says that it has come and waits for the other;
* TMA reductions become TMA stores, which read shared memory alike and are waited for alike (dq is then wrong, nothing else);
* registers stay evenly spread: its checks are calls that need more than the 24 of a warp that moves data. Beside 256 columns of
  output there are none for them at all: the forward's schedule for 256 runs on 128;
* dq is stored in the order of its columns: of shared memory under another layout it sees nothing.

It tells buffers apart by where they begin, so what is done in a slice that begins further on (the second warpgroup's half of dS,
P, K and V) is not seen; the first warpgroup runs the same code on the first half. Where each reads a part of what both have
written, both read the first part.

Source: Triton, include/triton/Dialect/TritonInstrument/IR/TritonInstrument.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import longctx.kernels
from longctx.kernels.shipped import Shipped

FOLDER = Path(longctx.kernels.__file__).parent
PARTS, NARROW, WIDE = "hopper_backward_parts", "hopper_backward_kernel", "hopper_backward_wide"
LOADER, FORWARD = "hopper_forward_loader", "hopper_forward_kernel"
# Loaded in this order: later ones use what stands in earlier ones.
MODULES = (PARTS, NARROW, WIDE, LOADER, FORWARD)
ENVIRONMENT = {"TRITON_INSTRUMENTATION_MODE": "consan", "CUDA_LAUNCH_BLOCKING": "1", "OMP_NUM_THREADS": "1"}
# Two row blocks of 192 with a ragged end, four tiles of 128 keys: every ring of buffers goes round more than once.
EVEN, RAGGED = 512, 520

# (module, what it does not see, what it does in its place).
UNSEEN = (
    (PARTS, "laid_out(dq_bufs.index(CID), EXCHANGED_PIECE).store(exchanged(dq))", "dq_bufs.index(CID).store(dq)"),
    (NARROW, "ds.slice(CID * 64, 64, dim=1).permute((1, 0))", "ds.slice(0, 64, dim=1).permute((1, 0))"),
)

_MEETING = re.compile(r"^( +)named_barrier_sync\(9, 256\)$", re.MULTILINE)


@dataclass(frozen=True)
class Change:
    """One text of a kernel's source and what stands in its place."""

    module: str
    old: str
    new: str


# name -> (which shipped kernel, what is left out). Each must be reported.
MISTAKES = {
    "keys are loaded over those still read": (
        "forward-d128-full-carry",
        Change(LOADER, "            mbarrier.wait(k_empty.index(stage), phase)\n", ""),
    ),
    "keys are read before they have come": (
        "forward-d128-rows-final",
        Change(
            FORWARD,
            "    mbarrier.wait(k_full.index(here), phase)\n    s = warpgroup_mma(",
            "    s = warpgroup_mma(",
        ),
    ),
    "dS is read before both warpgroups have written": (
        "backward-d128-full",
        Change(NARROW, "        named_barrier_sync(9, 256)\n", ""),
    ),
    "dS of the step before is read before both warpgroups have written": (
        "backward-d64-full",
        Change(NARROW, "            _await_other(t, ds_ready, CID)\n", "            pass\n"),
    ),
    "P is read before it has been written": (
        "backward-d256-full",
        Change(WIDE, "    await_signal(p_ready, 0, t, TO_OTHER)\n", ""),
    ),
    # Left out by who writes instead, it is only found where the store happens to be under way: that has been waited for, it sees.
    "dq is written over what is being added": (
        "backward-d128-full",
        Change(
            PARTS,
            "                tma_store_wait(1)\n"
            "                mbarrier.arrive(dq_empty.index(0), count=1)\n"
            "                tma_store_wait(0)\n"
            "                mbarrier.arrive(dq_empty.index(1), count=1)\n",
            "                mbarrier.arrive(dq_empty.index(0), count=1)\n"
            "                mbarrier.arrive(dq_empty.index(1), count=1)\n",
        ),
    ),
    "dO is read before it has come": (
        "backward-d256-full",
        Change(
            WIDE,
            "    mbarrier.wait(do_full.index(j), (t // V.do_stages) & 1)\n    dp =",
            "    dp =",
        ),
    ),
}


def shipped() -> dict[str, Shipped]:
    """Every instance that the library launches on Hopper, by its id."""
    from longctx.kernels import hopper_backward, hopper_forward

    found = (*hopper_forward.shipped_configurations(), *hopper_backward.shipped_configurations())
    return {one.id: one for one in found}


def sources(mistake: str | None = None) -> dict[str, str]:
    """module -> its source in the form that the sanitizer knows, with one mistake where one is named.

    Raises:
        AssertionError: a kernel's source has changed so that a replacement no longer fits: adapt it here.
    """
    texts = {name: (FOLDER / f"{name}.py").read_text() for name in MODULES}
    assert len(_MEETING.findall(texts[NARROW])) == 1, f"{NARROW}.py has other meetings than it had"
    if mistake is not None:
        # Before the meeting is replaced: it may be what is left out.
        change = MISTAKES[mistake][1]
        count = texts[change.module].count(change.old)
        assert count == 1, f"{change.module}.py has this {count} times, not once:\n{change.old}"
        texts[change.module] = texts[change.module].replace(change.old, change.new)
    for module, old, new in UNSEEN:
        assert texts[module].count(old) == 1, f"{module}.py has this no longer, or several times:\n{old}"
        texts[module] = texts[module].replace(old, new)
    met = r"\1tell(ds_ready, CID, TO_OTHER)\n\1await_signal(ds_ready, 1 - CID, t, TO_OTHER)"
    texts[NARROW] = _MEETING.sub(met, texts[NARROW])
    return texts


def install(folder: Path, mistake: str | None = None) -> None:
    """Put the kernels of `sources` in the place of the library's, in this process, before these are imported."""
    import race_signals
    from triton.experimental.gluon.language._semantic import GluonSemantic

    from longctx.kernels import gluon_api

    for name in ("signal_ring", "tell", "await_signal"):
        setattr(gluon_api, name, getattr(race_signals, name))
    for name, text in sources(mistake).items():
        path, full = folder / f"{name}.py", f"longctx.kernels.{name}"
        assert full not in sys.modules, f"{full} was imported before"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(full, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
        setattr(longctx.kernels, name, module)
    sys.modules[f"longctx.kernels.{PARTS}"].tma_reduce_add = gluon_api.tma_store
    plain = GluonSemantic.warp_specialize

    def evenly(self, functions, num_warps, num_registers, generator):
        warps = -(-(4 + sum(num_warps)) // 4) * 4
        return plain(self, functions, num_warps, [65536 // (32 * warps) // 8 * 8] * len(num_registers), generator)

    GluonSemantic.warp_specialize = evenly


def launch(one: Shipped, device: str) -> None:
    """Launch an instance once through the contract, on a small block."""
    import torch

    from longctx.kernels import SoftmaxState, hopper_attention, hopper_forward, tiles
    from longctx.masks import KeyRange

    # Two programs, which take several row blocks one after the other.
    for module in (tiles, hopper_forward):
        assert module.num_sms
        module.num_sms = lambda device: 2
    if one.direction == "forward" and one.head_dim == 256:
        one = replace(one, head_dim=128)
        hopper_forward.SCHEDULES[128] = hopper_forward.SCHEDULES[256]
    attention = hopper_attention.HopperAttention(deterministic=one.deterministic)
    s = EVEN if one.seq_len % 128 == 0 else RAGGED
    row = torch.arange(s, dtype=torch.int32)[None]
    visible = {
        "full": KeyRange.full(),
        "causal": KeyRange.causal(),
        "window": KeyRange("band", -s // 3, 1),
        "rows": KeyRange("rows", row // 200 * 200, row + 1),
    }[one.kind]
    dtype = getattr(torch, one.dtype)

    def make(heads: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(1, s, heads, one.head_dim, dtype=dtype, device=device)

    q, k, v = make(4), make(2), make(2)
    # A block that stands for a large one fixes its maxima; its first row is to be done again.
    hopper_forward.MIN_FLOPS_FIXED = 0 if one.seq_len >= 8000 else float("inf")
    q[:, 0] = float("nan")
    lse = torch.zeros(1, 4, s, device=device)
    if one.direction == "forward":
        state = SoftmaxState(make(4, torch.float32), lse) if one.carry else None
        attention.forward(q, k, v, visible, scale=0.1, softcap=one.softcap, state=state, final=one.final)
        return
    of_keys = [make(2, dtype if one.fresh else torch.float32) for _ in range(2)]
    attention.backward(
        q, q, k, v, lse, lse, visible, scale=0.1, softcap=one.softcap, out=q,
        dq_acc=make(4, torch.float32), dk_acc=of_keys[0], dv_acc=of_keys[1], fresh=one.fresh,
    )  # fmt: skip


def run(name: str, mistake: str | None = None, timeout: float = 600.0) -> str:
    """Launch a shipped instance in a process of its own; what the sanitizer said, empty if nothing.

    Raises:
        AssertionError: the process failed of something else, or did not end.
    """
    case = json.dumps(
        {"shipped": asdict(replace(shipped()[name], waits=frozenset())), "mistake": mistake}, default=list
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(FOLDER.parents[1]), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, __file__, case],
        capture_output=True, text=True, timeout=timeout, env={**env, **ENVIRONMENT, "PYTHONPATH": path},
    )  # fmt: skip
    said = sorted(set(re.findall(r"Assertion `([^`']*)[`'] failed", done.stderr)))
    if not said:
        assert done.returncode == 0, done.stderr[-3000:]
        assert "launched" in done.stdout, done.stdout[-1000:]
    return "; ".join(said)


def lower(one: Shipped) -> list[str]:
    """The kernels of an instance as the sanitizer gets them (TTGIR), compiled for sm_90 without a GPU."""
    import sm90
    from triton.backends.nvidia.compiler import CUDABackend

    class Lowered(Exception):
        pass

    found = []

    def stop(backend, module, *rest):
        found.append(str(module))
        raise Lowered

    from longctx.kernels import hopper_backward

    # Its kernel is Triton's own, without shared memory.
    rows = mock.patch.object(hopper_backward, "prepare_rows", lambda lse, delta, **form: (lse, delta))
    stopped = mock.patch.object(CUDABackend, "make_llir", stop)
    with sm90.compile_only(), stopped, rows, contextlib.suppress(Lowered):
        launch(one, "meta")
    return found


def compile_first() -> Callable[[], None]:
    """From now on Gluon kernels are only compiled; the function returned launches them, after other processes' have ended.

    The checks take some 20 KiB of stack a thread, which is gigabytes of a GPU in every process that has launched.
    """
    from triton.experimental.gluon._runtime import GluonJITFunction

    plain, waiting, lock = GluonJITFunction.run, [], []

    def run(self, *args, grid, warmup, **options):
        waiting.append(partial(plain, self, *args, grid=grid, warmup=warmup, **options))
        return plain(self, *args, grid=grid, warmup=True, **options)

    def launch_all() -> None:
        # Until this process ends.
        lock.append((Path(tempfile.gettempdir()) / "longctx-races.lock").open("w"))
        fcntl.flock(lock[0], fcntl.LOCK_EX)
        for one in waiting:
            one()

    GluonJITFunction.run = run
    return launch_all


def main(case: dict) -> None:
    """What the process of a case does."""
    import torch
    import triton

    one = Shipped(**{**case["shipped"], "waits": frozenset()})
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder), case["mistake"])
        if case.get("lower"):
            json.dump(lower(one), sys.stdout)
            return

        def scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
            # Its record of the buffers: nothing is known of them yet.
            return torch.zeros(size, dtype=torch.int8, device="cuda")

        launch_all = compile_first()
        triton.set_allocator(scratch)
        # Where later releases keep it.
        triton.runtime._allocation.set_profile_allocator(scratch)
        launch(one, "cuda")
        launch_all()
        torch.cuda.synchronize()
    print("launched")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
