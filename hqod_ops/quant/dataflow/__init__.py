"""Which tensor of a network is read where, and quantizers on what produces it."""

from hqod_ops.quant.dataflow.producers import (
    PlacedQuantizer,
    Placement,
    place_on_producers,
    placement,
)

__all__ = [
    "PlacedQuantizer",
    "Placement",
    "place_on_producers",
    "placement",
]
