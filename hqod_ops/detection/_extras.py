"""Imports of what ``pip install "hqod_ops[detection]"`` brings."""

from hqod_ops._extras import requirer

require = requirer("detection")
