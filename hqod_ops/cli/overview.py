"""What ``hqod --help`` shows: the commands by task, each with an example."""

from __future__ import annotations

from collections.abc import Mapping

TASKS: Mapping[str, Mapping[str, str]] = {
    "See it work": {
        "demo": "hqod demo --quick",
        "info": "hqod info",
    },
    "Train": {
        "train": "hqod train --data PATH --bits 4 --hqod --init runs/fp32/last.pt --name w4-hqod",
        "settings": "hqod settings",
        "yolo": "hqod yolo train model=yolo11n.pt data=data.yaml qat=hqod_w4a4",
    },
    "Quantize without training": {
        "quantize": "hqod quantize runs/fp32 --bits 8 --name w8",
        "sensitivity": "hqod sensitivity runs/fp32 --output layers.json",
        "search": "hqod search layers.json --average-bits 4.5 --output bits.toml",
    },
    "Evaluate": {
        "eval": "hqod eval runs/w4-hqod",
        "report": "hqod report runs --output report",
    },
    "Export": {
        "export": "hqod export runs/w4-hqod --out w4.onnx",
        "bench-export": "hqod bench-export float.onnx w4.onnx",
    },
}
"""An example of every command, by task."""


def example(name: str) -> str:
    """The example of a command."""
    return next(commands[name] for commands in TASKS.values() if name in commands)


def overview(summaries: Mapping[str, str]) -> str:
    """The commands by task: what each is for, and an example.

    Args:
        summaries (mapping): a line about each command, by its name.
    """
    lines = []
    for task, commands in TASKS.items():
        lines.append(f"{task}:")
        for name, shown in commands.items():
            lines += [f"  {name:14}{summaries[name]}", f"  {'':14}  {shown}"]
        lines.append("")
    return "\n".join([*lines, "hqod COMMAND --help lists the options of a command."])
