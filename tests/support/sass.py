"""What the compiler made of a kernel, read from its machine code: registers, spills, access widths, matrix instructions."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
REGISTERS_PER_SM, WARPS_PER_SM, BLOCKS_PER_SM, SUBPARTITIONS = 65536, 64, 32, 4
REGISTER_UNIT = 256  # registers are given to a warp in multiples of this
SHARED_PER_SM = {80: 167936, 90: 233472}  # bytes
SHARED_PER_BLOCK = {80: 166912, 90: 232448}  # bytes: the same less what the driver keeps
SHARED_RESERVED, SHARED_UNIT = 1024, 128

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
BACKWARDS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?BRA\b[^;]*?0x([0-9a-f]+)\s*;")
PLACE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?[A-Z]")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
WIDTH = re.compile(r"\.(?:[US])?(8|16|64|128)(?:\.|$)")


def read(cubin: bytes, warps: int, arch: int, shared: int) -> dict:
    """Facts about one kernel; `shared` is the dynamic shared memory of its launch in bytes.

    registers per thread, stack bytes, spill instructions, shared bytes, instructions, loop: those of the longest loop;
    loads and stores: how many global ones of each width in bits; matrix: how many matrix instructions of each kind;
    occupancy: resident warps / 64, and its limit.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", "--dump-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = RESOURCES.search(listing)
    if found is None:
        raise ValueError(f"cuobjdump: its listing names no resources: {listing[:200]!r}")
    registers, stack, static = map(int, found.groups())
    names = Counter(name for name in INSTRUCTION.findall(listing) if name != "NOP")
    shared = max(shared, static)
    occupancy, limit = _occupancy(registers, shared, warps, arch)
    return {
        "registers": registers,
        "stack": stack,
        "spills": sum(_starting(names, "LDL", "STL").values()),
        "shared": shared,
        "instructions": sum(names.values()),
        "loop": _longest_loop(listing),
        "loads": _widths(_starting(names, "LDG")),  # LDGSTS, the asynchronous copy to shared memory, included
        "stores": _widths(_starting(names, "STG")),
        "atomics": sum(_starting(names, "ATOMG", "REDG", "RED.").values()),
        "matrix": dict(_starting(names, "HMMA", "HGMMA")),
        "occupancy": occupancy,
        "limit": limit,
    }


def _longest_loop(listing: str) -> int:
    """Instructions from the target of a jump backwards to the jump; 0 without one."""
    jumps = [(int(target, 16), int(place, 16)) for place, target in BACKWARDS.findall(listing)]
    places = [int(place, 16) for place in PLACE.findall(listing)]
    # A jump to itself follows a kernel's end.
    return max((sum(a <= p <= b for p in places) for a, b in jumps if a < b), default=0)


def _starting(names: Counter, *prefixes: str) -> Counter:
    return Counter({name: count for name, count in names.items() if name.startswith(prefixes)})


def _widths(names: Counter) -> dict[int, int]:
    """Bits per thread and access -> number of instructions, widest first; without a suffix an access has 32 bits."""
    widths: Counter[int] = Counter()
    for name, count in names.items():
        found = WIDTH.search(name)
        widths[int(found[1]) if found else 32] += count
    return dict(sorted(widths.items(), reverse=True))


def _occupancy(registers: int, shared: int, warps: int, arch: int) -> tuple[float, str]:
    """Share of an SM's 64 warps that can be resident, and what limits it."""
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    block_shared = -(-(shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    blocks = {
        "registers": REGISTERS_PER_SM // SUBPARTITIONS // per_warp * SUBPARTITIONS // warps,
        "shared": SHARED_PER_SM[arch] // block_shared,
        "warps": WARPS_PER_SM // warps,
        "blocks": BLOCKS_PER_SM,
    }
    limit = min(blocks, key=lambda name: (blocks[name], name != "warps"))
    return blocks[limit] * warps / WARPS_PER_SM, limit
