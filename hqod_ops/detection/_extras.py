"""Imports of what ``pip install "hqod_ops[detection]"`` brings."""

from hqod_ops.extras import requirer

require = requirer("detection")
