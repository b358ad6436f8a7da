"""Who makes and who reads a tensor; quantizers on the producers, batch norms folded."""

from hqod_ops.quant.dataflow.fold import fold_batch_norm
from hqod_ops.quant.dataflow.producers import (
    PlacedQuantizer,
    Placement,
    place_on_producers,
    placement,
)

__all__ = [
    "PlacedQuantizer",
    "Placement",
    "fold_batch_norm",
    "place_on_producers",
    "placement",
]
