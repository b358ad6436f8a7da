"""The quantizers by the names that configurations use."""

from __future__ import annotations

from hqod_ops.quant.quantizers.base import Quantizer
from hqod_ops.quant.quantizers.dorefa import DoReFa
from hqod_ops.quant.quantizers.dsq import DSQ
from hqod_ops.quant.quantizers.lsq import LSQ
from hqod_ops.quant.quantizers.lsq_plus import LSQPlus
from hqod_ops.quant.quantizers.minmax import MinMaxSTE
from hqod_ops.quant.quantizers.pact import PACT
from hqod_ops.quant.quantizers.tqt import TQT, TQTFrozen

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
