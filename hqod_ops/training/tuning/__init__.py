"""Trained runs quantized without training, and the bits of their layers: commands of ``hqod``."""
