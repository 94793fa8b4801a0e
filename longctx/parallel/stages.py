"""Which decoder layers each stage of a pipeline gets: as even a load as whole layers allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longctx.shapes import ModelShape


@dataclass(frozen=True)
class StageCosts:
    """What the parts of a model cost in one step, in any one unit, such as FLOPs a token.

    Args:
        layer: of each decoder layer; they are all alike.
        first: of what the first stage has beside layers: the embedding.
        last: of what the last stage has beside layers: the output projection and the loss.
    """

    layer: float
    first: float = 0.0
    last: float = 0.0


def cut_stages(num_layers: int, stages: int, costs: StageCosts) -> tuple[range, ...]:
    """The layers of each stage, in order: contiguous, at least one each, the dearest stage as cheap as can be.

    Layers that could go to several stages alike go to the later ones: an earlier stage holds the activations of more
    micro-batches at a time.
    """
    assert 1 <= stages <= num_layers, f"{num_layers} layers cannot be cut into {stages} stages"
    counts = [1] * stages

    def cost(stage: int) -> float:
        beside = (costs.first if stage == 0 else 0.0) + (costs.last if stage == stages - 1 else 0.0)
        return beside + counts[stage] * costs.layer

    for _ in range(num_layers - stages):
        # All layers cost the same, so adding each where it makes the least of a load is optimal.
        counts[min(range(stages), key=lambda stage: (cost(stage), -stage))] += 1
    found, start = [], 0
    for count in counts:
        found.append(range(start, start + count))
        start += count
    return tuple(found)


def cut_by_flops(shape: ModelShape, stages: int, seq_len: int, *, tied: bool, window: int | None) -> tuple[range, ...]:
    """The layers of each stage of such a model, by the FLOPs of a step.

    Args:
        seq_len: tokens of a sequence; attention is counted as of one causal document. 0: without attention.
        tied: the output projection is the embedding's weight.
        window: keys that a query sees; None: all before it.
    """
    seen = seq_len if window is None else min(seq_len, 2 * window)
    # Forward and backward, a token: 6 for each weight, and for each pair of a query with the half of the keys it sees 12 for
    # each element of a head. An embedding is looked up.
    attention = 12 * shape.num_heads * shape.head_dim * seen / 2
    layer = 6 * _layer_params(shape, tied) + attention
    return cut_stages(shape.num_layers, stages, StageCosts(layer, last=6 * shape.vocab_size * shape.hidden_size))


def params_of_stages(shape: ModelShape, stages: Sequence[range], *, tied: bool) -> list[int]:
    """Parameters of each stage; a tied embedding is held by the first and, if that is another, the last."""
    table = shape.vocab_size * shape.hidden_size
    found = [len(layers) * _layer_params(shape, tied) for layers in stages]
    found[0] += table
    found[-1] += shape.hidden_size + (0 if tied and len(stages) == 1 else table)
    return found


def _layer_params(shape: ModelShape, tied: bool) -> int:
    embeddings = shape.vocab_size * shape.hidden_size * (1 if tied else 2)
    return (shape.num_params - embeddings - shape.hidden_size) // shape.num_layers
