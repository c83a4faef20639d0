"""Drop device code from a CUDA shared library; the host code, and every address in the file, stay.

    prune_fatbin.py LIBRARY OUT [--arch 90] [--units REGEX] [--filler OTHER_LIBRARY]

Kept are the cubins of one architecture (90: sm_90 and sm_90a), with --units only those of source files whose name the
expression matches. Each fat binary of the section .nv_fatbin keeps its kept entries, moved together, and a header that
gives their size; what is left over is zeros, which compress to nothing. A fat binary without a kept entry gets the
smallest cubin of another architecture, of this library or of --filler: well-formed, and of no use to the device.
Kernels that came as PTX of an older architecture alone (Marlin's, for example) are lost.
"""

import argparse
import re
import struct
from pathlib import Path

MAGIC = 0xBA55ED50
CUBIN = 2
# The compiler names a unit's internal symbols after the source file.
UNIT = re.compile(rb"_INTERNAL_[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]")


def section(data: bytes, name: bytes) -> tuple[int, int]:
    """Offset and length of a section in the file."""
    (heads_at,) = struct.unpack_from("<Q", data, 0x28)
    size, number, names = struct.unpack_from("<HHH", data, 0x3A)
    heads = [struct.unpack_from("<IIQQQQIIQQ", data, heads_at + i * size) for i in range(number)]
    start = heads[names][4]
    for head in heads:
        if data[start + head[0] : data.index(b"\0", start + head[0])] == name:
            return head[4], head[5]
    raise SystemExit(f"no section {name.decode()}")


def fat_binaries(data: bytes):
    """Position, header size, size and entries (kind, architecture, bytes) of each."""
    offset, length = section(data, b".nv_fatbin")
    pos, end = offset, offset + length
    while pos + 16 <= end:
        magic, _, head, size = struct.unpack_from("<IHHQ", data, pos)
        if magic != MAGIC:
            pos += 8
            continue
        at, stop, found = pos + head, pos + head + size, []
        while at < stop:
            kind, _, entry_head, payload = struct.unpack_from("<HHIQ", data, at)
            (arch,) = struct.unpack_from("<I", data, at + 28)
            found.append((kind, arch, bytes(data[at : at + entry_head + payload])))
            at += entry_head + payload
        assert at == stop, "an entry runs over its fat binary"
        yield pos, head, size, found
        pos = stop


def smallest_foreign(data: bytes, arch: int) -> bytes:
    """The smallest cubin of another architecture."""
    return min(
        (e for *_, found in fat_binaries(data) for kind, of, e in found if kind == CUBIN and of != arch), key=len
    )


def prune(data: bytearray, arch: int, units: str | None, filler: bytes) -> dict:
    """Prune in place; return what was counted."""
    wanted = re.compile(units.encode()) if units else None

    def is_kept(kind: int, of: int, entry: bytes) -> bool:
        if kind != CUBIN or of != arch:
            return False
        unit = wanted and UNIT.search(entry)
        return not unit or bool(wanted.search(unit[1]))

    count = {"fatbins": 0, "kept": 0, "emptied": 0, "bytes": 0}
    for pos, head, size, found in list(fat_binaries(data)):
        kept = [entry for kind, of, entry in found if is_kept(kind, of, entry)]
        count["fatbins"] += 1
        count["kept"] += len(kept)
        count["emptied"] += not kept
        body = b"".join(kept or [filler])
        assert len(body) <= size, "the filler does not fit"
        count["bytes"] += len(body)
        struct.pack_into("<Q", data, pos + 8, len(body))
        data[pos + head : pos + head + size] = body + bytes(size - len(body))
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("out")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--units")
    parser.add_argument("--filler")
    args = parser.parse_args()
    library = bytearray(Path(args.library).read_bytes())
    source = Path(args.filler).read_bytes() if args.filler else bytes(library)
    print(args.library.rsplit("/", 1)[-1], prune(library, args.arch, args.units, smallest_foreign(source, args.arch)))
    with open(args.out, "wb") as file:
        file.write(library)
