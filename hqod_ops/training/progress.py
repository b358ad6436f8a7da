"""A progress bar, by rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hqod_ops.extras import requirer

_require = requirer("detection")


@contextmanager
def progress_bar(
    title: str, total: int, *, start: int = 0, enabled: bool = True
) -> Iterator[Callable[[str], None]]:
    """A bar on the error output, where that is a terminal; it vanishes at the end.

    Args:
        title (str): what is done.
        total (int): number of steps.
        start (int): steps done already. Default: 0
        enabled (bool): False shows nothing. Default: True

    Yields:
        callable: ``advance(note)`` counts a step and shows a note behind the bar.

    Example:
        >>> from hqod_ops.training.progress import progress_bar
        >>> with progress_bar("count", 2) as advance:
        ...     advance("one")
        ...     advance("two")
    """
    rich = _require("rich.progress", "rich")
    console = _require("rich.console", "rich").Console(stderr=True)
    note = rich.TextColumn("{task.fields[note]}")
    columns = (*rich.Progress.get_default_columns(), rich.MofNCompleteColumn(), note)
    hidden = not (enabled and console.is_terminal)
    with rich.Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(title, total=total, completed=start, note="")
        yield lambda note: bar.update(task, advance=1, note=note)
