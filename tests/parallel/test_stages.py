"""The cut into stages: every layer once, and no other cut has a cheaper dearest stage."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from longctx.model import ModelConfig
from longctx.parallel.stages import StageCosts, cut_stages


def dearest(stages: tuple[range, ...], costs: StageCosts) -> float:
    loads = [len(layers) * costs.layer for layers in stages]
    loads[0] += costs.first
    loads[-1] += costs.last
    return max(loads)


def all_cuts(num_layers: int, stages: int):
    for inner in itertools.combinations(range(1, num_layers), stages - 1):
        yield tuple(range(a, b) for a, b in itertools.pairwise((0, *inner, num_layers)))


@given(
    num_layers=st.integers(1, 9),
    stages=st.integers(1, 9),
    first=st.floats(0.0, 5.0),
    last=st.floats(0.0, 5.0),
)
def test_no_cut_is_better(num_layers, stages, first, last):
    stages = min(stages, num_layers)
    costs = StageCosts(1.0, first, last)
    cut = cut_stages(num_layers, stages, costs)
    assert [layer for layers in cut for layer in layers] == list(range(num_layers))
    assert all(cut)
    best = min(dearest(other, costs) for other in all_cuts(num_layers, stages))
    assert dearest(cut, costs) <= best + 1e-9


def test_layers_left_over_go_to_late_stages():
    assert [len(layers) for layers in cut_stages(6, 4, StageCosts(1.0))] == [1, 1, 2, 2]


def test_an_output_projection_takes_the_place_of_layers():
    # 128k words make a projection of more than two layers' FLOPs; long sequences make layers dear.
    config = ModelConfig(vocab_size=128_256, hidden_size=2048, num_layers=16, num_heads=32, num_kv_heads=8)
    short, long = ([len(layers) for layers in config.stages(2, seq_len)] for seq_len in (1 << 12, 1 << 17))
    assert short[0] > 9
    assert long == [8, 8]
    windowed = ModelConfig(**{**vars(config), "sliding_window": 1024})
    assert windowed.stages(2, 1 << 17) == config.stages(2, 1 << 11)


def test_the_parameters_of_stages():
    for tied in (False, True):
        config = ModelConfig(num_layers=5, tie_embeddings=tied, qkv_bias=True, qk_norm=True)
        assert config.stage_params(config.stages(1, 64)) == [config.shape.num_params]
        extra = config.vocab_size * config.hidden_size if tied else 0
        assert sum(config.stage_params(config.stages(3, 64))) == config.shape.num_params + extra
