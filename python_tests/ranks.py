"""A function run by two processes of one gloo group."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2


def _run(rank: int, work: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    torch.save(work(rank), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # DistributedDataParallel keeps the group, and so gloo's threads, for the life of the process.
    # A thread that drops the last reference to a tensor while the interpreter shuts down aborts
    # the process (pytorch/pytorch#179291): so it ends here, without a shutdown.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work(rank)` returns in each of the two processes."""
    mp.spawn(_run, args=(work, str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
