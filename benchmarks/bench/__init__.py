"""What ``bench_ops.py`` runs: entries as data, their peers, and how they are measured and shown."""

import os

# Kineto, the profiler's library, reports a missing GPU as an error; it reads this when torch loads.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
