"""Progress on standard error: a bar where rich is installed and somebody watches, else lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with what comes next, ``total`` times in all."""
    if not sys.stderr.isatty():  # a bar would leave nothing in a log before its end
        yield _lines(total)
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    except ImportError:
        yield _lines(total)
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Drawn at every block alone: a thread that redraws would disturb what is timed.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task("", total=total)
        started = False

        def step(text: str) -> None:
            nonlocal started
            bar.update(task, description=text, advance=1 if started else 0, refresh=True)
            started = True

        yield step
        bar.update(task, description="done", completed=total, refresh=True)


def _lines(total: int) -> Callable[[str], None]:
    done, start = 0, time.monotonic()

    def step(text: str) -> None:
        nonlocal done
        done += 1
        print(
            f"[{done}/{total}, {time.monotonic() - start:.0f} s] {text}",
            file=sys.stderr,
            flush=True,
        )

    return step
