"""Detectors of other libraries, one file a library; imported when one's model is met."""

from hqod_ops.integrations.harmonize import harmonize, unharmonize

__all__ = ["harmonize", "unharmonize"]
