"""Stand-ins of the C and C++ runtime to link against, without what is newer than a distribution's.

    python scripts/old_runtime.py DIRECTORY --glibc 2.28 --glibcxx 3.4.24 --cxxabi 1.3.11

A library that was linked on a new Linux asks for the newest version of each symbol, and an older
Linux refuses to load it. Most symbols have older versions in the same files. This writes libc.so,
libm.so and libstdc++.so with the symbols of this machine's, each in its newest version up to the
limits, and nothing behind them: libraries linked against these (`-L DIRECTORY`, first) load
wherever the limits hold. What has no version that old is missing, and the linker says so. The
defaults are those of manylinux_2_28.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections import defaultdict
from pathlib import Path

LIBRARIES = {
    "libc.so.6": "libc.so.6",
    "ld-linux-x86-64.so.2": "ld-linux-x86-64.so.2",
    "libm.so": "libm.so.6",
    "libstdc++.so": "libstdc++.so.6",
}
SYMBOL = re.compile(
    r"^[0-9a-f]+ .{6}(?P<kind>.) (?P<section>\S+)\s+(?P<size>[0-9a-f]+)\s+"
    r"\(?(?P<version>[A-Za-z_]+_[0-9.]+)\)?\s+(?P<name>\S+)$"
)


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("_")[-1].split("."))


def symbols(path: str) -> dict[str, list[tuple[str, str, int]]]:
    """Of each symbol its versions, with what it is and its size."""
    table = subprocess.run(["objdump", "-T", path], capture_output=True, text=True, check=True)
    found = defaultdict(list)
    for line in table.stdout.splitlines():
        match = SYMBOL.match(line)
        if match and match["section"] not in ("*UND*", "*ABS*"):
            kind = "tls_object" if match["section"] in (".tbss", ".tdata") else ""
            kind = kind or ("object" if match["kind"] == "O" else "function")
            found[match["name"]].append((match["version"], kind, int(match["size"], 16)))
    return found


def place(cxx: str, name: str) -> str:
    """Where the compiler finds a library."""
    command = [cxx, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def stand_in(
    path: str, out: Path, soname: str, limits: dict[str, tuple[int, ...]], cxx: str
) -> None:
    """Write the stand-in of one library."""
    source, by_version = [], defaultdict(list)
    for name, versions in symbols(path).items():
        allowed = [
            (number(version), version, kind, size)
            for version, kind, size in versions
            if (limit := limits.get(version.rpartition("_")[0])) and number(version) <= limit
        ]
        if not allowed:
            continue
        _, version, kind, size = max(allowed)
        alias = f"s{len(source)}"
        by_version[version].append(name)
        section = '.section .tbss,"awT",@nobits' if kind == "tls_object" else ".data"
        source.append(
            f"{section}\n.globl {alias}\n.type {alias}, @{kind}\n{alias}: .zero {max(size, 1)}\n"
            f".size {alias}, {max(size, 1)}\n.symver {alias}, {name}@@{version}, remove\n"
        )
    script = "".join(f"{version} {{ }};\n" for version in sorted(by_version, key=number))
    assembly, versions_file = out.with_suffix(".s"), out.with_suffix(".map")
    assembly.write_text("".join(source))
    versions_file.write_text(script)
    command = [cxx, "-shared", "-nostdlib", f"-Wl,-soname,{soname}"]
    subprocess.run(
        [*command, f"-Wl,--version-script,{versions_file}", "-o", str(out), str(assembly)],
        check=True,
    )
    assembly.unlink()
    versions_file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--glibc", default="2.28")
    parser.add_argument("--glibcxx", default="3.4.24")
    parser.add_argument("--cxxabi", default="1.3.11")
    parser.add_argument("--cxx", default="g++")
    args = parser.parse_args()
    limits = {
        "GLIBC": number(args.glibc),
        "GLIBCXX": number(args.glibcxx),
        "CXXABI": number(args.cxxabi),
    }
    args.directory.mkdir(parents=True, exist_ok=True)
    directory = args.directory.resolve()
    for name, soname in LIBRARIES.items():
        stand_in(place(args.cxx, soname), directory / name, soname, limits, args.cxx)
    # As the real libc.so: the part that is linked in, and the loader's.
    parts = [directory / "libc.so.6", place(args.cxx, "libc_nonshared.a")]
    script = f"GROUP ( {parts[0]} {parts[1]} AS_NEEDED ( {directory}/ld-linux-x86-64.so.2 ) )\n"
    (directory / "libc.so").write_text(script)


if __name__ == "__main__":
    main()
