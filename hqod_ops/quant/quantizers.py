"""The quantizers by the names that configurations use."""

from __future__ import annotations

from hqod_ops.quant.dorefa import DoReFa
from hqod_ops.quant.dsq import DSQ
from hqod_ops.quant.lsq import LSQ
from hqod_ops.quant.lsq_plus import LSQPlus
from hqod_ops.quant.minmax import MinMaxSTE
from hqod_ops.quant.pact import PACT
from hqod_ops.quant.quantizer import Quantizer
from hqod_ops.quant.tqt import TQT, TQTFrozen

QUANTIZERS: dict[str, type[Quantizer]] = {
    "lsq": LSQ,
    "lsq_plus": LSQPlus,
    "tqt": TQT,
    "tqt_frozen": TQTFrozen,
    "pact": PACT,
    "dorefa": DoReFa,
    "dsq": DSQ,
    "minmax": MinMaxSTE,
}
"""The quantizers by the names that configurations use; what each is for: its ``roles``."""
