"""Keep only one GPU's machine code in a CUDA library: python slim.py IN OUT [--arch 90]

A library's section .nv_fatbin holds one fat binary per compiled file: a header, then an entry for
each GPU. The wanted entries are moved to the front, the header is given the smaller size, and what
follows becomes zeros, which pack to nothing; the file's length and layout stay. A file that has
nothing for the wanted GPU keeps one entry of another with its code zeroed: launching such a kernel
(Blackwell's, quantized formats) fails, as it should.
"""

import argparse
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

HEADER = struct.Struct("<IHHQ")  # magic, version, size of the header, size of the entries
ENTRY = struct.Struct("<HHIQ")  # kind, version, size of the entry's header, size of its code
ARCH = struct.Struct("<I")
ARCH_OFFSET = 28  # in an entry's header
MAGIC, VERSION = 0xBA55ED50, 1
ELF = 2  # kind of an entry with machine code; 1 is PTX
START = HEADER.pack(MAGIC, VERSION, HEADER.size, 0)[:8]


@dataclass(frozen=True)
class Entry:
    """One GPU's code in a fat binary, header included."""

    kind: int
    arch: int
    header: int
    data: bytes

    def emptied(self) -> "Entry":
        """With zeros for code."""
        blank = self.data[: self.header] + bytes(len(self.data) - self.header)
        return Entry(self.kind, self.arch, self.header, blank)


def entries(data: bytes, at: int, end: int) -> list[Entry]:
    """The entries from ``at`` on; ValueError where they do not end at ``end``."""
    found = []
    while at < end:
        kind, _, header, code = ENTRY.unpack_from(data, at)
        (arch,) = ARCH.unpack_from(data, at + ARCH_OFFSET)
        found.append(Entry(kind, arch, header, bytes(data[at : at + header + code])))
        at += header + code
    if at != end:
        raise ValueError(f"the entries end at byte {at:#x}, expected {end:#x}")
    return found


def slim(data: bytearray, arch: int) -> dict[str, int]:
    """Change ``data`` in place.

    Returns:
        ``binaries`` found, how many of them ``without`` code for ``arch``, bytes of their entries
        ``before`` and ``after``.
    """
    counts = dict.fromkeys(("binaries", "without", "before", "after"), 0)
    at = data.find(START)
    while at >= 0:
        size, begin = HEADER.unpack_from(data, at)[3], at + HEADER.size
        found = entries(data, begin, begin + size)
        kept = [entry for entry in found if (entry.kind, entry.arch) == (ELF, arch)]
        if not kept:
            counts["without"] += 1
            smallest = min(found, key=lambda entry: (entry.kind != ELF, len(entry.data)))
            kept = [smallest.emptied()]
        body = b"".join(entry.data for entry in kept)
        data[at : begin + size] = (
            HEADER.pack(MAGIC, VERSION, HEADER.size, len(body)) + body + bytes(size - len(body))
        )
        counts["binaries"] += 1
        counts["before"] += size
        counts["after"] += len(body)
        at = data.find(START, begin + size)
    return counts


def main() -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--arch", type=int, default=90, help="compute capability (90: Hopper)")
    args = parser.parse_args()
    data = bytearray(args.source.read_bytes())
    try:
        counts = slim(data, args.arch)
    except (ValueError, struct.error) as error:
        print(f"error: {args.source} is no library this can read: {error}", file=sys.stderr)
        return 2
    args.target.parent.mkdir(parents=True, exist_ok=True)
    args.target.write_bytes(data)
    print(
        f"{args.source.name}: {counts['before'] / 1e6:.1f} MB of GPU code, "
        f"{counts['after'] / 1e6:.1f} of it for sm_{args.arch}; {counts['without']} of "
        f"{counts['binaries']} files have none"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
