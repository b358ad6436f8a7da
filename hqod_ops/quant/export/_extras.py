"""Imports of what ``pip install "hqod_ops[export]"`` brings."""

from hqod_ops.extras import requirer

require = requirer("export")
