"""What the text of a compiled program says: its buffers, and what its loops move and tell each other."""

import math
import re

import numpy as np

SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]+)\]")
ITEMS = {"pred": 1, "bf16": 2}
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
MOVE = re.compile(r"[\])}] (copy|transpose|gather|scatter)\(")
HELD = re.compile(r"[\])}] (?:parameter|get-tuple-element|bitcast|tuple|while|constant)\(")
COLLECTIVE = re.compile(r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def largest_buffers(text: str, count: int = 4) -> list[str]:
    """What instructions of a compiled program write, largest first; fused intermediates are no buffers."""
    sizes: dict[str, int] = {}
    fused = False
    for line in text.splitlines():
        if line.endswith("{"):
            fused = "fused_computation" in line
        result = line.partition(" = ")[2]
        if result and not fused and not result.startswith("("):
            dtype, dims = SHAPE.match(result).groups() if SHAPE.match(result) else ("pred", "1")
            item = ITEMS.get(dtype) or int(dtype[1:]) // 8
            sizes[f"{dtype}[{dims}]"] = item * math.prod(map(int, dims.split(",")))
    return [f"{name} {size / 2**20:.0f} MiB" for name, size in sorted(sizes.items(), key=lambda s: -s[1])[:count]]


def computations(text: str) -> dict[str, list[str]]:
    """The instructions of every computation of a compiled program."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line.endswith("{") and " -> " in line:
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def loop_computations(text: str) -> dict[str, list[str]]:
    """The bodies of a program's loops and whatever they call."""
    found = computations(text)
    waiting = [name for lines in found.values() for line in lines for name in re.findall(r"body=%?([\w.-]+)", line)]
    inside: dict[str, list[str]] = {}
    while waiting:
        name = waiting.pop()
        if name not in inside:
            inside[name] = found[name]
            waiting += [n for line in found[name] for n in CALLED.findall(line) if n in found]
    return inside


def loop_lines(text: str) -> list[str]:
    return [line for lines in loop_computations(text).values() for line in lines]


def loop_collectives(text: str) -> list[str]:
    return [line for line in loop_lines(text) if COLLECTIVE.search(line)]


def results(line: str) -> list[tuple[str, tuple[int, ...], int]]:
    """Type, shape and bytes of what an instruction gives; several of a tuple."""
    written = re.split(r"[\])}] [a-z-]+\(", line.partition(" = ")[2])[0] + "]"
    found = [(dtype, tuple(map(int, dims.split(",")))) for dtype, dims in SHAPE.findall(written)]
    return [(dtype, shape, (ITEMS.get(dtype) or int(dtype[1:]) // 8) * math.prod(shape)) for dtype, shape in found]


def moved_in_loops(text: str, smallest: int) -> list[str]:
    """Copies, transposes, gathers and scatters of at least so many bytes inside the loops, fused ones among them."""
    moves = [line for line in loop_lines(text) if MOVE.search(line)]
    return [line.strip()[:200] for line in moves if any(size >= smallest for *_, size in results(line))]


def written_in_loops(text: str, shapes: list[tuple[int, ...]]) -> list[str]:
    """What loops write out, and do not pass on inside a fusion, in one of these shapes, whatever order its axes have.

    What is prefetched into a core's own memory, S(1), is none of it.
    """
    sizes = {tuple(sorted(n for n in shape if n > 1)) for shape in shapes}
    bodies = [lines for name, lines in loop_computations(text).items() if "fused_computation" not in name]
    lines = [
        line for lines in bodies for line in lines if not HELD.search(line) and "S(1)" not in line.partition("(%")[0]
    ]
    return [
        line.strip()
        for line in lines
        if any(tuple(sorted(n for n in shape if n > 1)) in sizes for _, shape, _ in results(line))
    ]


def sampling_bytes(text: str, width: int) -> int:
    """Of the largest array that collectives in the loops move, hidden states (of ``width`` numbers) aside."""
    arrays = [result for line in loop_collectives(text) for result in results(line)]
    return max((size for _, shape, size in arrays if shape[-1] != width), default=0)


def spans_shards(line: str, tensor: int) -> bool:
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]+\})\}", line):
        groups = [[int(i) for i in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    elif iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        dims = [int(n) for n in iota[3].split(",")]
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids.transpose([int(n) for n in iota[4].split(",")]) if iota[4] else ids
        groups = ids.reshape(int(iota[1]), int(iota[2])).tolist()
    else:
        listed = re.search(r"replica_groups=\{(.*?)\}\}?,", line)
        groups = [[int(i) for i in g.split(",")] for g in re.findall(r"[\d,]+", listed[1])] if listed else []
        if not any(groups):
            return True  # all devices
    return any(len({i // tensor for i in group}) > 1 for group in groups)
