"""Compile the Triton kernels for a GPU without one: the library's own launch code on tensors without storage.

Needs Triton's compiler, so it must run in a process without TRITON_INTERPRET. As a script it reads jobs as JSON from
standard input and writes what ptxas says about each kernel to standard output.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch

KINDS = ("full", "causal", "window", "rows")
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
    """Inside, launching a kernel only compiles it; yields the list that compiled kernels are put in."""
    import triton
    from triton.runtime.jit import JITFunction

    assert not triton.knobs.runtime.interpret, "kernels made for the interpreter cannot be compiled"
    compiled = []
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        # Kernels are remembered per device number, not per target.
        self.device_caches.clear()
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    triton.runtime.driver.set_active(_NoDriver(capability))
    JITFunction.run = warm_up
    try:
        yield compiled
    finally:
        JITFunction.run = run


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
    """Compile one kernel; `job`: kernel, head_dim, dtype, kind, carry, tile (fields of `Tile`), s, b, h, hk, capability (90),
    softcap (0).

    Kernel "hopper_forward" takes kernel, head_dim, dtype, kind, carry, final, s, b, h, hk, softcap, and has tiles of its own.

    Returns the job with registers, spill_bytes, shared, num_wgmma and warnings of ptxas, or with `error`.
    """
    if job["kernel"] == "hopper_forward":
        return _compile_hopper_forward(job)
    from longctx.kernels import SoftmaxState
    from longctx.kernels.triton_attention import TritonAttention
    from longctx.kernels.tuning import Tile, Tiles

    tile = Tile(**job["tile"])
    b, s, h, hk, d = (job[x] for x in ("b", "s", "h", "hk", "head_dim"))
    q = torch.empty(b, s, h, d, dtype=getattr(torch, job["dtype"]), device="meta")
    k = v = torch.empty(b, s, hk, d, dtype=q.dtype, device="meta")
    lse = torch.empty(b, h, s, device="meta")
    acc_q, acc_k = torch.empty(q.shape, device="meta"), torch.empty(k.shape, device="meta")
    attention = TritonAttention(Tiles(tile, tile, tile))
    visible = key_range(job["kind"], s)
    capability = job.get("capability", 90)
    options = {"scale": d**-0.5, "softcap": job.get("softcap", 0.0)}
    with compile_only(capability) as compiled:
        try:
            if job["kernel"] == "forward":
                state = SoftmaxState(acc_q, lse) if job["carry"] else None
                attention.forward(q, k, v, visible, **options, state=state)
            elif job["kernel"] == "dq":
                attention.add_dq(q, q, k, v, lse, lse, visible, **options, dq_acc=acc_q)
            else:
                attention.add_dkdv(q, q, k, v, lse, lse, visible, **options, dk_acc=acc_k, dv_acc=acc_k)
        except Exception as error:
            return {**job, "error": f"{type(error).__name__}: {str(error)[-300:]}"}
    ((_, kernel),) = compiled
    return {**job, **_report(kernel, capability)}


def _compile_hopper_forward(job: dict) -> dict:
    from longctx.kernels import SoftmaxState, hopper_forward

    b, s, h, hk, d = (job[x] for x in ("b", "s", "h", "hk", "head_dim"))
    q = torch.empty(b, s, h, d, dtype=getattr(torch, job["dtype"]), device="meta")
    k = v = torch.empty(b, s, hk, d, dtype=q.dtype, device="meta")
    state = SoftmaxState(torch.empty(q.shape, device="meta"), torch.empty(b, h, s, device="meta"))
    hopper_forward._num_programs = lambda device: 132
    with compile_only() as compiled:
        try:
            hopper_forward.launch_hopper_forward(
                q, k, v, key_range(job["kind"], s), scale=d**-0.5, softcap=job.get("softcap", 0.0),
                state=state if job["carry"] else None, final=job["final"],
            )  # fmt: skip
        except Exception as error:
            return {**job, "error": f"{type(error).__name__}: {str(error)[-300:]}"}
    ((_, kernel),) = compiled
    return {**job, **_report(kernel, 90)}


def _report(kernel, capability: int) -> dict:
    ptx = kernel.asm["ptx"]
    return {
        **_assemble(ptx, capability),
        "shared": kernel.metadata.shared,
        "num_wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "num_tma": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "max_registers": sorted({int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)}),
    }


def _assemble(ptx: str, capability: int) -> dict:
    """What ptxas reports: registers, spilled bytes, spills inside the loops that matter, and the warnings that tell of
    serialised matrix instructions."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = os.path.join(folder, "kernel.ptx"), os.path.join(folder, "kernel.cubin")
        with open(source, "w") as f:
            f.write(ptx)
        text = _tool("ptxas", "-v", f"--gpu-name=sm_{capability}{'a' * (capability >= 90)}", source, "-o", cubin)
        loops = matrix_loops(_tool("nvdisasm", "-c", cubin))
    spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = re.search(r"Used (\d+) registers", text)
    return {
        "registers": int(registers.group(1)) if registers else None,
        "spill_bytes": max(map(int, spill.groups())) if spill else None,
        "loops": loops,
        "warnings": sorted({line for line in text.splitlines() if re.search(r"C75\d\d|error", line)}),
    }


def _tool(name: str, *args: str) -> str:
    import triton.backends.nvidia

    folder = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin")
    # Newer releases of Triton bring two assemblers, of which one reads what they write.
    for path in (os.path.join(folder, name), os.path.join(folder, f"{name}-blackwell")):
        done = subprocess.run([path, *args], capture_output=True, text=True)
        text = done.stdout + done.stderr
        if "Unsupported .version" not in text:
            break
    return text


def matrix_loops(sass: str) -> list[dict]:
    """The innermost loops with matrix instructions: how many of those, of all instructions, and of spills in each; and of
    exponentials after the products of one tile are done and before those of the other are waited for, which run under them."""
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
            "num_spills": sum(bool(re.search(r"\b(STL|LDL)\b", x)) for x in lines[first:last]),
            "num_covered_exp2": _covered_exp2(lines[first:last]),
        }
        for first, last in inner
    ]


def _covered_exp2(body: list[str]) -> int:
    waits = [(i, m.group(1)) for i, x in enumerate(body) if (m := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", x))]
    one_left = max((i for i, left in waits if left == "0x1"), default=0)
    none_left = max((i for i, left in waits if left == "0x0"), default=0)
    return sum("MUFU.EX2" in x for x in body[one_left:none_left])


def compile_jobs(jobs: list[dict], workers: int) -> list[dict]:
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(compile_job, jobs))


if __name__ == "__main__":
    json.dump(compile_jobs(json.load(sys.stdin), int(sys.argv[1]) if len(sys.argv) > 1 else 2), sys.stdout)
