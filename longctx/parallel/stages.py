"""Which decoder layers each stage of a pipeline gets: as even a load as whole layers allow."""

from __future__ import annotations

from dataclasses import dataclass


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
