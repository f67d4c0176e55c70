"""What a GPU's machine code issues in a loop, read off ``cuobjdump -sass``."""

from __future__ import annotations

import heapq
import importlib.util
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction; ``guard`` is the predicate that it runs under, if any."""

    address: int
    guard: str
    name: str
    rest: str

    @property
    def target(self) -> int:
        """Where a branch goes."""
        return int(re.findall(r"0x([0-9a-f]+)", self.rest)[-1], 16)


class Way(NamedTuple):
    """A way through a loop's body by what tells it from others, and the instructions that it issues."""

    loads: tuple[int, int]  # of 16 and of 8 bytes
    stores: tuple[int, int]
    products: int  # FMUL: tells how many elements, and of which variant of a rule
    from_fp16: int
    issued: int


_COUNTED = ("LDG.E.128", "LDG.E.64", "STG.E.128", "STG.E.64", "FMUL", "HADD2.F32")
#: Ways with more of these are left out, to save time: those of AMSGrad and those that store in 8 bytes.
_MOST = (4, 4, 4, 0, 96, 32)


def disassembler() -> str | None:
    """The path of cuobjdump, of a CUDA toolkit or of Triton."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        beside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(beside) if beside.exists() else None
    return found


def disassemble(cubin: Path) -> dict[str, list[Instruction]]:
    """The instructions of each function, by mangled name."""
    command = [str(disassembler()), "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    one = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
    functions = {}
    for part in text.split("Function : ")[1:]:
        functions[part.split()[0]] = [Instruction(int(m[1], 16), m[2] or "", m[3], m[4]) for m in one.finditer(part)]
    return functions


def _blocks(code: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Runs of instructions without a branch, and which may follow which. Calls, of the rare cases, lead nowhere."""
    jumps = ("BRA", "BRX", "EXIT", "RET", "CALL")
    at = {one.address: index for index, one in enumerate(code)}
    begins = {0}
    for index, one in enumerate(code):
        if one.name.startswith(jumps):
            begins.add(index + 1)
            if one.name.startswith("BRA"):
                begins.add(at[one.target])
    ordered = sorted(begin for begin in begins if begin < len(code))
    number = {begin: block for block, begin in enumerate(ordered)}
    blocks = [code[begin:end] for begin, end in zip(ordered, [*ordered[1:], len(code)], strict=True)]
    follow: list[list[int]] = []
    for block, run in enumerate(blocks):
        last, after = run[-1], []
        if last.name.startswith("BRA"):
            after.append(number[at[last.target]])
        conditional = last.guard or re.match(r"\s*!?U?P\d", last.rest) or ".DIV" in last.name
        if block + 1 < len(blocks) and (not last.name.startswith(jumps) or (conditional and last.name[:4] != "CALL")):
            after.append(block + 1)
        follow.append(after)
    return blocks, follow


def loops(code: list[Instruction]) -> Iterator[list[Way]]:
    """For each loop that loads nothing but vectors, the shortest of its ways of each kind."""
    blocks, follow = _blocks(code)
    counts = [Counter(want for one in run for want in _COUNTED if one.name.startswith(want)) for run in blocks]
    marks = [tuple(count[want] for want in _COUNTED) for count in counts]
    backward: dict[int, int] = defaultdict(int)
    for block, after in enumerate(follow):
        for other in after:
            if other <= block:
                backward[other] = max(backward[other], block)
    for head, last in sorted(backward.items()):
        body = [one.name for run in blocks[head : last + 1] for one in run]
        if last - head > 1500 or not any(mark[0] + mark[1] for mark in marks[head : last + 1]) or "LDG.E.U16" in body:
            continue
        found: dict[tuple[int, ...], int] = {}
        seen = set()
        queue = [(len(blocks[head]), head, marks[head])]
        while queue:
            issued, block, mark = heapq.heappop(queue)
            if (block, mark) in seen:
                continue
            seen.add((block, mark))
            for other in follow[block]:
                if other == head:
                    found.setdefault(mark, issued)
                elif other > block:
                    more = tuple(a + b for a, b in zip(mark, marks[other], strict=True))
                    if all(a <= b for a, b in zip(more, _MOST, strict=True)):
                        heapq.heappush(queue, (issued + len(blocks[other]), other, more))
        yield [Way(mark[:2], mark[2:4], mark[4], mark[5], issued) for mark, issued in found.items()]  # type: ignore[arg-type]
