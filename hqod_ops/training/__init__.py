"""Training runs: settings, loop, checkpoints, evaluation, reports; ``hqod train`` and ``demo``."""
