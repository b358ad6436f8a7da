"""What to quantize, and how: configuration, rules, presets, the plan that they make for a model."""

from hqod_ops.quant.config.plan import LayerPlan, Plan, plan_qat
from hqod_ops.quant.config.qat_config import FLOAT_BITS, PRESETS, QATConfig, Rule
from hqod_ops.quant.config.toml import from_toml, load_config, save_config, to_toml

__all__ = [
    "FLOAT_BITS",
    "LayerPlan",
    "PRESETS",
    "Plan",
    "QATConfig",
    "Rule",
    "from_toml",
    "load_config",
    "plan_qat",
    "save_config",
    "to_toml",
]
