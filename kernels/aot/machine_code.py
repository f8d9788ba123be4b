"""What a compiled kernel does, counted in its intermediate code and its machine code; nothing is run.

Counts are static: an instruction inside a loop counts once, and both sides of a branch count. So figures of one kernel
can be compared with each other and with a limit, but are no times. Where each comes from:

    registers, stack, shared memory   cuobjdump on the assembled code
    instructions                      the assembled code, 16 bytes each, without the padding behind its end
    barriers, access widths           PTX; the assembler keeps both
    gathers, lookups, elements        Triton's own intermediate code (TTIR), which still has whole tiles

A thread's share of a tile is its elements divided by the threads of a program. The largest tile that a kernel loads or
stores says how many elements a thread computes; loads and stores of at least half of that tile are those of the
tensors' data, as opposed to parameters of channels, statistics of rows and tables. They are found in PTX by their line
and column in the source.
"""

from __future__ import annotations

import collections
import math
import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass

MAX_SHARED_BYTES = 64 * 1024  # the limit of sm_75, the smallest
# double precision and tensor cores: an elementwise kernel or a reduction that uses either has a bug
FORBIDDEN = re.compile(r"\b(?:[a-z0-9.]+\.f64|(?:wmma|mma|wgmma|tcgen05)\.[a-z0-9_.]+)")
INSTRUCTION_BYTES = 16  # of sm_70 and later
NOP, BRANCH = 0x918, 0x947  # the low 12 bits of an instruction, as nvdisasm reads them


@dataclass(frozen=True)
class Code:
    """Figures of one compiled kernel; all but shared_bytes are those of one thread.

    stack_bytes: spilled registers. instructions: in the program's code. elements: of the largest tile.
    barriers: synchronizations of a program. gathers: elements loaded from global memory at addresses that depend on
    data loaded element by element, as in a table lookup or a binary search; an address that one loaded pointer gives to
    a whole tile does not count. lookups: elements looked up in a table in shared memory or registers (tl.gather).
    width: bytes of the narrowest access to the tensors' data. loads, stores: all accesses to global memory,
    as "number x bytes, ..." from wide to narrow. forbidden: fp64 and tensor-core instructions.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: int
    elements: int
    barriers: int
    gathers: int
    lookups: int
    width: int
    loads: str
    stores: str
    forbidden: tuple[str, ...] = ()

    @property
    def instructions_per_element(self) -> float:
        return self.instructions / self.elements

    def failures(self) -> list[str]:
        """Return why the code fails the gate whichever kernel it is, one message each."""
        messages = []
        if self.stack_bytes:
            messages.append(f"{self.stack_bytes} bytes of spilled registers per thread")
        if self.shared_bytes > MAX_SHARED_BYTES:
            messages.append(f"{self.shared_bytes} bytes of shared memory, limit {MAX_SHARED_BYTES}")
        if self.forbidden:
            messages.append(f"forbidden instructions: {', '.join(self.forbidden)}")
        return messages


@dataclass(frozen=True)
class Tiles:
    """What TTIR says of a program. by_place: "file:line:column" of loads and stores -> elements of their tile."""

    largest: int
    by_place: dict[str, int]
    gathered: tuple[int, ...]
    looked_up: tuple[int, ...]


_RESULTS = re.compile(r"^\s*(%\w+)(?::(\d+))? = (.*)$")
_VALUE = re.compile(r"%\w+(?:#\d+)?")
_LOCATION = re.compile(r"\s*loc\((#loc\d*|unknown)\)\s*$")


def _num_elements(text: str) -> int:
    """Return the elements of the last tensor type in a text, 1 if it ends in none."""
    types = re.findall(r"tensor<((?:\d+x)+)", text.rpartition(" : ")[2])
    return math.prod(int(n) for n in types[-1].split("x")[:-1]) if types else 1


def _places(ttir: str) -> dict[str, str]:
    """Return location name -> "file:line:column" of the innermost source line."""
    definitions = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))
    places = {}
    for name, start in definitions.items():
        text = start
        while True:
            if match := re.fullmatch(r'"(?:[^"]*/)?([^"/]+)":(\d+):(\d+)', text):
                places[name] = ":".join(match.groups())
                break
            # a named location, "x"(#loc1), or one inlined from a helper: callsite(#loc1 at #loc2)
            inner = re.search(r"#loc\d*", text)
            if inner is None:
                break
            text = definitions[inner.group()]
    return places


def _with_own_names(lines: list[str]) -> list[str]:
    """Return the lines with a name of its own for each value: two loops side by side use the same names."""
    scopes: list[dict[str, str]] = [{}]
    renamed = []
    for number, line in enumerate(lines):
        text = _LOCATION.sub("", line)
        match = _RESULTS.match(text)
        # what stands at the left is defined by this line, everything else is a loop's or was defined before
        result, body = (match.group(1), text[match.end(1) :]) if match else (None, text)
        arguments = re.search(r"iter_args\((.*?)\)", text)
        inner = {name: f"{name}_{number}" for name in re.findall(r"(%\w+) =", arguments.group(1) if arguments else "")}
        known = {name: own for scope in (*scopes, inner) for name, own in scope.items()}
        parts = re.split(r"(%\w+)", body)
        renamed.append("".join([f"{result}_{number}" if result else "", *(known.get(part, part) for part in parts)]))
        if result:
            scopes[-1][result] = f"{result}_{number}"
        for _ in range(text.count("}") - text.count("{")):
            scopes = scopes[:-1] or [{}]
        if text.rstrip().endswith("{"):
            # the second side of a branch, "} else {", takes the place of the first
            scopes = [*(scopes[:-1] if text.strip().startswith("}") else scopes), inner]
    return renamed


def read_tiles(ttir: str) -> Tiles:
    """Return what a program loads, stores, gathers and looks up.

    Raises ValueError for scf.while, through which values are not followed.
    """
    if "scf.while" in ttir:
        raise ValueError("gathers cannot be found in a kernel with a while loop; use a for loop")
    lines, places = ttir.splitlines(), _places(ttir)
    # values that depend on data loaded element by element; loops carry them backwards, hence the repetition
    loaded: set[str] = set()
    gathers: dict[int, int] = {}
    before = -1
    named = _with_own_names(lines)
    while before != len(loaded):
        before = len(loaded)
        # the open regions, innermost last: what a yield gives its values to, as lists by position
        regions: list[list[list[str]] | None] = []
        for number, text in enumerate(named):
            match = _RESULTS.match(text)
            name, count, operation = match.groups() if match else (None, None, text.strip())
            results = [] if name is None else [f"{name}#{i}" for i in range(int(count))] if count else [name]
            arguments = re.search(r"iter_args\((.*?)\)", operation)
            carried = re.findall(r"(%\w+) = (%\w+(?:#\d+)?)", arguments.group(1)) if arguments else []
            loaded |= {inside for inside, initial in carried if initial in loaded}
            if operation.startswith("scf.yield") and regions and regions[-1] is not None:
                values = _VALUE.findall(operation)
                for receivers in regions[-1]:
                    loaded |= {to for to, value in zip(receivers, values, strict=False) if value in loaded}
            elif operation.startswith("tt.load "):
                address = _VALUE.search(operation).group()
                if address in loaded:
                    gathers[number] = _num_elements(operation)
                # one value for the whole program is not "element by element"
                if _num_elements(operation) > 1:
                    loaded.update(results)
            elif not operation.startswith("scf.") and _num_elements(operation) > 1:
                loaded.update(results if loaded.intersection(_VALUE.findall(operation)) else ())
            for _ in range(operation.count("}") - operation.count("{")):
                if regions:
                    regions.pop()
            if operation.endswith("{") and not operation.startswith("}"):
                is_loop_or_branch = operation.startswith(("scf.for", "scf.if"))
                regions.append([results, [inside for inside, _ in carried]] if is_loop_or_branch else None)
    by_place: dict[str, int] = {}
    looked_up = []
    for line in lines:
        if "tt.gather " in line:
            looked_up.append(_num_elements(_LOCATION.sub("", line)))
        if "tt.load " in line or "tt.store " in line:
            location = _LOCATION.search(line)
            place = places.get(location.group(1), "unknown") if location else "unknown"
            by_place[place] = max(by_place.get(place, 1), _num_elements(_LOCATION.sub("", line)))
    return Tiles(max(by_place.values(), default=1), by_place, tuple(gathers.values()), tuple(looked_up))


_ACCESS = re.compile(r"\b(ld|st|atom|red)\.global((?:\.[\w:]+)*)")


def read_accesses(ptx: str) -> list[tuple[str, int, str]]:
    """Return the accesses to global memory as (ld, st, atom or red; bytes; "file:line:column")."""
    accesses, place = [], "unknown"
    for line in ptx.splitlines():
        if location := re.match(r"\s*\.loc\s.*//\s*([^\s/]+:\d+:\d+)", line):
            place = location.group(1)
        elif access := _ACCESS.search(line):
            kind, suffixes = access.groups()
            vector = re.search(r"\.v(\d)\b", suffixes)
            bits = int(re.search(r"\.[busf](\d+)", suffixes).group(1))
            accesses.append((kind, bits // 8 * (int(vector.group(1)) if vector else 1), place))
    return accesses


def _histogram(widths: list[int]) -> str:
    counts = collections.Counter(widths)
    return ", ".join(f"{counts[width]} x {width}" for width in sorted(counts, reverse=True))


def _text(cubin: bytes) -> bytes:
    """Return an ELF file's .text sections."""
    offset, size, count, names_index = *struct.unpack_from("<Q", cubin, 0x28), *struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    names = sections[names_index][4]

    def name(section: tuple) -> bytes:
        start = names + section[0]
        return cubin[start : cubin.index(b"\0", start)]

    return b"".join(cubin[s[4] : s[4] + s[5]] for s in sections if name(s).startswith(b".text"))


def count_instructions(cubin: bytes) -> int:
    """Return the instructions of a program, without the padding: a branch to itself, then no-ops."""
    text = _text(cubin)
    codes = [code & 0xFFF for (code,) in struct.iter_unpack("<H14x", text)]
    while codes and codes[-1] == NOP:
        codes.pop()
    if codes and codes[-1] == BRANCH:
        codes.pop()
    return len(codes)


def read_code(compiled) -> Code:
    """Return the figures of a kernel that Triton compiled."""
    from triton import knobs

    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    tiles, accesses = read_tiles(compiled.asm["ttir"]), read_accesses(ptx)
    threads = 32 * compiled.metadata.num_warps

    def share(elements: int) -> int:
        return -(-elements // threads)

    # an access whose place is unknown counts as one to data, so that none is overlooked
    data = [width for _, width, place in accesses if 2 * tiles.by_place.get(place, tiles.largest) >= tiles.largest]
    return Code(
        registers=numbers["REG"],
        stack_bytes=numbers["STACK"] + numbers["LOCAL"],
        # static shared memory, and the dynamic part requested at launch
        shared_bytes=numbers["SHARED"] + compiled.metadata.shared,
        instructions=count_instructions(cubin),
        elements=share(tiles.largest),
        barriers=len(re.findall(r"\b(?:bar|barrier)(?:\.cta)?\.(?:sync|red|arrive)", ptx)),
        gathers=sum(map(share, tiles.gathered)),
        lookups=sum(map(share, tiles.looked_up)),
        width=min(data, default=0),
        loads=_histogram([width for kind, width, _ in accesses if kind == "ld"]),
        stores=_histogram([width for kind, width, _ in accesses if kind != "ld"]),
        forbidden=tuple(sorted(set(FORBIDDEN.findall(ptx)))),
    )
