"""Compile the Triton kernels for a GPU without one: the library's own launch code on tensors without storage.

Needs Triton's compiler, so it must run in a process without TRITON_INTERPRET. As a script it reads jobs as JSON from
standard input and writes what ptxas says about each kernel to standard output.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

import torch

KERNELS = ("forward", "dq", "dkdv")


class _NoDriver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@contextmanager
def compile_only(capability: int = 90):
    """Inside, launching a kernel only compiles it; yields the list of (name, compiled kernel, log of ptxas)."""
    import triton
    from triton.runtime.jit import JITFunction

    assert not triton.knobs.runtime.interpret, "kernels made for the interpreter cannot be compiled"
    # ptxas says what it did only when it runs: nothing is taken from the cache on the disk.
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    compiled = []
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        # Kernels are remembered per device number, not per target.
        self.device_caches.clear()
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.__name__, kernel, log.getvalue()))

    triton.runtime.driver.set_active(_NoDriver(capability))
    # What a launcher asks of a device that is not there: how many programs run side by side, and to be the current one.
    properties = types.SimpleNamespace(multi_processor_count=132)
    with (
        mock.patch.object(JITFunction, "run", warm_up),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
    ):
        yield compiled


def key_range(kind: str, s: int):
    from longctx.masks import UNBOUNDED, KeyRange

    return {
        "full": KeyRange.full(),
        "causal": KeyRange.causal(),
        "window": KeyRange("band", -s // 4, 1),
        "rows": KeyRange("rows", *(torch.zeros(1, s, dtype=torch.int32) for _ in range(2))),
        "suffix": KeyRange("band", -s // 4, UNBOUNDED),
    }[kind]


def compile_job(job: dict) -> dict:
    """Compile what one job launches, on tensors without storage.

    Args:
        job: kernel, head_dim, dtype, kind, carry, s, b, h, hk, softcap (0). Of the portable kernels "forward", "dq" and "dkdv"
            also tile (fields of `Tile`) and capability (90); of "hopper_forward" final (False), of "hopper_backward" fresh and
            deterministic (False).

    Returns:
        The job with `triton`, where it was compiled, and `kernels`, a report of each kernel that was launched, or `error`. What
        is said of a single kernel stands beside that as well.
    """
    import triton

    done = {**job, "triton": os.path.dirname(triton.__file__)}
    launch = _launch_hopper if job["kernel"].startswith("hopper") else _launch_portable
    with compile_only(job.get("capability", 90)) as compiled:
        try:
            launch(job, {"scale": job["head_dim"] ** -0.5, "softcap": job.get("softcap", 0.0)})
        except Exception as error:
            return {**done, "error": f"{type(error).__name__}: {str(error)[-300:]}"}
    reports = [_report(*of_kernel) for of_kernel in compiled]
    return {**done, **(reports[0] if len(reports) == 1 else {}), "kernels": reports}


def _launch_portable(job: dict, options: dict) -> None:
    from longctx.kernels import SoftmaxState
    from longctx.kernels.triton_attention import TritonAttention
    from longctx.kernels.tuning import Tile, Tiles

    tile = Tile(**job["tile"])
    q, k, lse, acc_q, acc_k = _block(job)
    attention = TritonAttention(Tiles(tile, tile, tile))
    visible = key_range(job["kind"], job["s"])
    if job["kernel"] == "forward":
        state = SoftmaxState(acc_q, lse) if job["carry"] else None
        attention.forward(q, k, k, visible, **options, state=state)
    elif job["kernel"] == "dq":
        attention.add_dq(q, q, k, k, lse, lse, visible, **options, dq_acc=acc_q)
    else:
        attention.add_dkdv(q, q, k, k, lse, lse, visible, **options, dk_acc=acc_k, dv_acc=acc_k)


def _launch_hopper(job: dict, options: dict) -> None:
    """Through the contract, as the library launches it."""
    from longctx.kernels import SoftmaxState, get_kernel

    attention = get_kernel("hopper")
    if job.get("deterministic"):
        attention = type(attention)(deterministic=True)
    q, k, lse, acc_q, acc_k = _block(job)
    visible = key_range(job["kind"], job["s"])
    if job["kernel"] == "hopper_forward":
        state = SoftmaxState(acc_q, lse) if job.get("carry") else None
        attention.forward(q, k, k, visible, **options, state=state, final=job.get("final", False))
        return
    fresh = job.get("fresh", False)
    into = torch.empty_like(k) if fresh else acc_k
    attention.backward(
        q, q, k, k, lse, lse, visible, **options, out=q, dq_acc=acc_q, dk_acc=into, dv_acc=into, fresh=fresh
    )


def _block(job: dict) -> tuple[torch.Tensor, ...]:
    """q, k, lse, and fp32 accumulators of both, without storage."""
    b, s, h, hk, d = (job[x] for x in ("b", "s", "h", "hk", "head_dim"))
    q = torch.empty(b, s, h, d, dtype=getattr(torch, job["dtype"]), device="meta")
    k = torch.empty(b, s, hk, d, dtype=q.dtype, device="meta")
    return (q, k, *(torch.empty(shape, device="meta") for shape in ((b, h, s), q.shape, k.shape)))


def _report(name: str, kernel, log: str) -> dict:
    """One kernel: registers, spilled bytes, spills inside the loops that matter, matrix instructions and how many of them
    stay in flight at its waits, and the warnings that tell of serialised ones."""
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        loops = matrix_loops(_disassemble(cubin.name))
    spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spill is not None, f"not a log of ptxas: {log}"
    assert registers is not None, f"not a log of ptxas: {log}"
    return {
        "name": name,
        "registers": int(registers.group(1)),
        "spill_bytes": max(map(int, spill.groups())),
        "loops": loops,
        "warnings": sorted({line for line in log.splitlines() if re.search(r"C75\d\d|error", line)}),
        "shared": kernel.metadata.shared,
        "num_wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "num_tma": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "waits": sorted({int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", ptx)}),
        "max_registers": sorted({int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)}),
    }


def _disassemble(cubin: str) -> str:
    import triton.backends.nvidia

    path = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "nvdisasm")
    return subprocess.run([path, "-c", cubin], capture_output=True, text=True, check=True).stdout


def matrix_loops(sass: str) -> list[dict]:
    """The innermost loops with matrix instructions: how many of those, of all instructions, of maxima and of spills in each; and
    of exponentials after the products of one tile are done and before those of the other are waited for, which run under them."""
    labels, lines = {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(lines)
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            lines.append(line)
    spans = []
    for i, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*?`\((\.L_x_\d+)\)", line)
        if target and labels.get(target.group(1), i + 1) <= i:
            span = (labels[target.group(1)], i)
            body = lines[span[0] : i]
            # A wait for a barrier is retried out of line, behind the kernel's end: no loop of ours.
            if any("HGMMA" in x for x in body) and not any("EXIT" in x for x in body):
                spans.append(span)
    inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [
        {
            "instructions": last - first,
            "num_matrix": sum("HGMMA" in x for x in lines[first:last]),
            "num_max": sum("FMNMX" in x for x in lines[first:last]),
            "num_spills": sum(bool(re.search(r"\b(STL|LDL)\b", x)) for x in lines[first:last]),
            "num_covered_exp2": _covered_exp2(lines[first:last]),
        }
        for first, last in inner
    ]


def _covered_exp2(body: list[str]) -> int:
    waits = [(i, m.group(1)) for i, x in enumerate(body) if (m := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", x))]
    between = [body[i:j] for (i, left), (j, _) in pairwise(waits) if left != "0x0"]
    return max((sum("MUFU.EX2" in x for x in part) for part in between), default=0)


def compile_jobs(jobs: list[dict], workers: int) -> list[dict]:
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(compile_job, jobs))


if __name__ == "__main__":
    json.dump(compile_jobs(json.load(sys.stdin), int(sys.argv[1]) if len(sys.argv) > 1 else 2), sys.stdout)
