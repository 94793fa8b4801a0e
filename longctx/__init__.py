"""Train transformers on very long sequences: FlashAttention-style block kernels composed over GPUs by a ring.

The public names are loaded when they are first used, so `import longctx` is fast and has no side effects.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longctx.attention import ParallelAttention
    from longctx.config import load_config
    from longctx.errors import LongCtxError
    from longctx.functional import context_parallel_attention, linear_cross_entropy, ring_attention
    from longctx.layout import get_layout
    from longctx.masks import Causal, Documents, Full, PrefixLM, SlidingWindow
    from longctx.model import ModelConfig, Transformer
    from longctx.parallel.mesh import ParallelMesh
    from longctx.parallel.plan import ParallelPlan
    from longctx.sequence import SequenceMeta
    from longctx.trainer import Trainer

__version__ = "0.1.0"

# public name -> the module that holds it. One-device `attention` is `longctx.functional.attention`: at the top its name
# would be that of the module `longctx.attention`.
_HOME = {
    "Causal": "longctx.masks",
    "Documents": "longctx.masks",
    "Full": "longctx.masks",
    "LongCtxError": "longctx.errors",
    "ModelConfig": "longctx.model",
    "ParallelAttention": "longctx.attention",
    "ParallelMesh": "longctx.parallel.mesh",
    "ParallelPlan": "longctx.parallel.plan",
    "PrefixLM": "longctx.masks",
    "SequenceMeta": "longctx.sequence",
    "SlidingWindow": "longctx.masks",
    "Trainer": "longctx.trainer",
    "Transformer": "longctx.model",
    "get_layout": "longctx.layout",
    "context_parallel_attention": "longctx.functional",
    "linear_cross_entropy": "longctx.functional",
    "load_config": "longctx.config",
    "ring_attention": "longctx.functional",
}

__all__ = [
    "Causal",
    "Documents",
    "Full",
    "LongCtxError",
    "ModelConfig",
    "ParallelAttention",
    "ParallelMesh",
    "ParallelPlan",
    "PrefixLM",
    "SequenceMeta",
    "SlidingWindow",
    "Trainer",
    "Transformer",
    "__version__",
    "context_parallel_attention",
    "get_layout",
    "linear_cross_entropy",
    "load_config",
    "ring_attention",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'longctx' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
