"""What the kernels' tests share: a process in which Triton kernels are interpreted."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch


@pytest.fixture(scope="module")
def interpreter():
    """Call a function of a module of tests in a process whose Triton kernels are interpreted, which is decided at import."""
    pool = ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        assert pool.submit(os.getpid).result(120) != os.getpid()
    yield lambda function, *args: pool.submit(function, *args).result(300)
    pool.shutdown()
