"""What the CUDA compiler makes of the kernels: registers, spills, the width of accesses; and what the module holds.

No GPU is needed, only nvcc.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import sass
from cases import INF, module
from ptx_code import CUDA, NVCC, SOURCES, compile_ptx, known_architectures

ARCHITECTURES = ("80", "90", "100")
#: Others, whose machine code is made from the PTX of one of those.
RELATIVES = {"86": "80", "89": "80", "103": "100", "120": "100"}
#: Four blocks of 256 threads on a multiprocessor, see Note [Registers].
MOST_REGISTERS = 64
NORMS = 5
#: The one that every run compiles for.
USUAL = "90"

needs_nvcc = pytest.mark.skipif(NVCC is None or not CUDA.exists(), reason="nvcc or the sources are not here")


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of a kernel, in bytes but for the registers."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def each_architecture(names: Iterable[str]) -> pytest.MarkDecorator:
    """All but the usual one take a minute of compiling, and are left to `make test-full`."""
    marks = {name: () if name == USUAL else (pytest.mark.full,) for name in names}
    return pytest.mark.parametrize("arch", [pytest.param(name, marks=mark) for name, mark in marks.items()])


def parse_report(text: str) -> dict[str, Kernel]:
    """The kernels in ptxas' report, by mangled name. Device functions that were not inlined are left out."""
    kernels = {}
    for name, rest in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", text, re.S):
        sizes = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        frame = re.search(sizes + r"\s+ptxas info\s+: Used (\d+) registers", rest)
        assert frame is not None, rest
        stack, stores, loads, registers = map(int, frame.groups())
        kernels[name] = Kernel(registers, stack, stores, loads)
    return kernels


def short_name(mangled: str) -> str:
    """``update_kernel<Adam>``, ``statistics_kernel<2>``, ``upload_kernel<3840>``, ``map_kernel``."""
    found = re.search(r"\d([a-z]+_kernel)(?:I(?:NS_\d+(\w+?)E|LNS_\w*?E(\d+)E|Lm(\d+)E)E)?", mangled)
    assert found is not None, mangled
    argument = found[2] or found[3] or found[4]
    return f"{found[1]}<{argument}>" if argument else found[1]


class Output(NamedTuple):
    """What became of one source for one architecture."""

    report: str  # ptxas'
    ptx: str
    cubin: Path


Compiled = dict[tuple[str, str], Output]


def assemble(source: str, arch: str, folder: Path) -> Output:
    """One source for one architecture, as nvcc does it: its PTX, and what ptxas makes of that."""
    assert NVCC is not None
    ptx, cubin = compile_ptx(source, RELATIVES.get(arch, arch)), folder / f"{source}-{arch}.cubin"
    ptxas = shutil.which("ptxas", path=f"{Path(NVCC).resolve().parent}{os.pathsep}{os.environ.get('PATH', '')}")
    command = [str(ptxas), "-O3", f"-arch=sm_{arch}", "-v", "-o", cubin, ptx]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return Output(result.stderr, ptx.read_text(), cubin)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Compiled:
    """By source and architecture, of what the tests of this run ask for and this nvcc knows."""
    folder = tmp_path_factory.mktemp("ptxas")
    wanted = {
        item.callspec.params["arch"] for item in request.session.items if "arch" in getattr(item, "fixturenames", ())
    }
    known = known_architectures() & (wanted | {RELATIVES.get(arch, arch) for arch in wanted} | {USUAL})
    jobs = [(source, arch) for arch in ARCHITECTURES for source in SOURCES if arch in known]
    more = [(source, arch) for arch in RELATIVES for source in SOURCES if arch in known and source != "upload"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        first = list(pool.map(lambda job: assemble(*job, folder), jobs))  # these make the PTX of the others, too
        return dict(zip([*jobs, *more], [*first, *pool.map(lambda job: assemble(*job, folder), more)], strict=True))


def reports(compiled: Compiled, arch: str) -> dict[str, Kernel]:
    """The kernels of an architecture, by short name."""
    if ("update", arch) not in compiled:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    found = [parse_report(compiled[source, arch].report) for source in SOURCES if (source, arch) in compiled]
    kernels = [(short_name(name), kernel) for report in found for name, kernel in report.items()]
    assert len(dict(kernels)) == len(kernels)
    return dict(kernels)


def entries(ptx: str) -> dict[str, str]:
    """The body of each kernel in PTX, by short name."""
    parts = re.split(r"^(?:\.visible |\.weak )?\.(?:entry|func)\b", ptx, flags=re.M)[1:]
    return {short_name(part.split("(")[0]): part for part in parts if "_kernel" in part.split("(")[0]}


REPORT = """\
ptxas info    : Compiling entry function '_ZN8fusedopt4cuda3gpu3abc13update_kernelINS_4AdamEEEvNS0_15UpdateArgumentsE' \
for 'sm_90'
ptxas info    : Function properties for _ZN8fusedopt4cuda3gpu3abc13update_kernelINS_4AdamEEEvNS0_15UpdateArgumentsE
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 62 registers, used 1 barriers, 368 bytes smem
ptxas info    : Function properties for __internal_accurate_pow
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_ZN8fusedopt4cuda3gpu3abc10map_kernelENS0_6TablesE' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 22 registers
"""


def test_the_report_is_read() -> None:
    found = {short_name(name): kernel for name, kernel in parse_report(REPORT).items()}
    assert found == {"update_kernel<Adam>": Kernel(62, 8, 12, 16), "map_kernel": Kernel(22, 0, 0, 0)}


@needs_nvcc
@pytest.mark.slow
class TestKernels:
    @each_architecture(ARCHITECTURES)
    def test_all_are_there(self, compiled: Compiled, arch: str) -> None:
        names = set(reports(compiled, arch))
        expected = {f"statistics_kernel<{kind}>" for kind in range(NORMS)} | {"conclude_kernel", "map_kernel"}
        assert expected <= names
        rest = Counter(name.partition("<")[0] for name in names - expected)
        assert rest["upload_kernel"] == 2
        if module is not None:
            for kernel in ("update_kernel", "carried_kernel"):
                rules = {f"{kernel}<{rule.title()}>" for rule in module.rule_names()}
                assert {name for name in names if name.startswith(kernel)} == rules
        assert set(rest) == {"upload_kernel", "update_kernel", "carried_kernel"}, "and no others"

    @each_architecture([*ARCHITECTURES, *RELATIVES])
    def test_registers_suffice_without_spills(self, compiled: Compiled, arch: str) -> None:
        for name, kernel in reports(compiled, arch).items():
            assert kernel.registers <= MOST_REGISTERS, name
            assert (kernel.stack, kernel.spill_stores, kernel.spill_loads) == (0, 0, 0), name

    @each_architecture(ARCHITECTURES)
    def test_streams_move_in_16_bytes_of_global_memory(self, compiled: Compiled, arch: str) -> None:
        """An access to what might be shared memory as well is slower, and a sign that the compiler was not told."""
        reports(compiled, arch)
        plain, carried, statistics = (
            entries(compiled[source, arch].ptx) for source in ("update", "carried", "statistics")
        )
        updates = {**plain, **carried}
        for name, body in updates.items():
            assert re.search(r"\bld\.global(\.nc)?\.v4\.[ufb]32", body), name
            assert re.search(r"\bst\.global\.v4\.[ufb]32", body), name
        for name, body in statistics.items():
            if name.startswith("statistics_kernel"):
                assert re.search(r"\bld\.global(\.nc)?\.v4\.[ufb]32", body), name
        for name, body in {**updates, **statistics}.items():
            assert re.findall(r"\b(?:ld|st)\.v[248]\.\w+", body) == [], name

    @each_architecture(ARCHITECTURES)
    def test_the_update_can_start_early_from_sm_90_on(self, compiled: Compiled, arch: str) -> None:
        reports(compiled, arch)
        early = int(arch) >= 90
        for source in ("update", "carried"):
            for name, body in entries(compiled[source, arch].ptx).items():
                assert ("griddepcontrol.wait" in body) == early, name
        for name, body in entries(compiled["statistics", arch].ptx).items():
            assert ("griddepcontrol.launch_dependents" in body) == (early and name.startswith("statistics")), name

    @each_architecture(ARCHITECTURES)
    def test_nothing_is_contracted(self, compiled: Compiled, arch: str) -> None:
        """See Note [Same bits everywhere]: fma appears where it was asked for, and never in float."""
        reports(compiled, arch)
        for source in ("update", "carried"):
            for body in entries(compiled[source, arch].ptx).values():
                assert "fma.rn.f32" not in body

    @pytest.mark.skipif(sass.disassembler() is None, reason="cuobjdump is not here")
    def test_instructions_per_element(self, compiled: Compiled) -> None:
        """What Note [Dtypes at run time] says, and as much for SGD with momentum; without write_back_grads."""
        reports(compiled, "90")
        functions = sass.disassemble(compiled["update", "90"].cubin)
        found: dict[tuple[str, str], float] = {}
        for rule, states, products in (("Adam", 2, 12), ("Sgd", 1, 5)):
            (code,) = (code for name, code in functions.items() if rule in name)
            # Elements of a vector, and its conversions from float16. A mixed row has float16 gradients and all else in
            # float32, and its loads are pairs of which one is done.
            kinds = {"float32": (4, 0), "bfloat16": (8, 0), "float16": (8, 8 * (states + 2)), "mixed": (4, 4)}
            for way in (way for ways in sass.loops(code) for way in ways):
                for kind, (elements, from_fp16) in kinds.items():
                    loads = (states + 2, states + 2 if kind == "mixed" else 0)
                    # The gradient's store may be one that is not done.
                    stores = {(states + 1, 0)} | ({(states + 2, 0)} if kind == "float32" else set())
                    if (way.products, way.from_fp16) != (products * elements, from_fp16):
                        continue
                    if way.loads == loads and way.stores in stores:
                        found[rule, kind] = min(way.issued / elements, found.get((rule, kind), INF))
        most = {"float32": (48, 20), "bfloat16": (51, 21), "float16": (51, 21), "mixed": (62, 29)}
        want = {(rule, kind): most[kind][index] for index, rule in enumerate(("Adam", "Sgd")) for kind in most}
        assert found.keys() == want.keys()
        assert {key: value for key, value in found.items() if value > want[key]} == {}


def fat_binaries(data: bytes) -> Counter[tuple[str, int]]:
    """How many images for each ("ptx" or "elf", architecture) are embedded in a file: the headers that nvcc writes."""
    found: Counter[tuple[str, int]] = Counter()
    magic = struct.pack("<I", 0xBA55ED50)
    at = data.find(magic)
    while at >= 0:
        if at + 16 <= len(data):
            _, version, header, size = struct.unpack_from("<IHHQ", data, at)
            end = at + header + size
            if (version, header) == (1, 16) and end <= len(data):
                image = at + header
                while image + 32 <= end:
                    kind, _, head, length = struct.unpack_from("<HHIQ", data, image)
                    (arch,) = struct.unpack_from("<I", data, image + 28)
                    found[{1: "ptx", 2: "elf"}.get(kind, "other"), arch] += 1
                    image += head + length
        at = data.find(magic, at + 4)
    return found


@pytest.mark.skipif(module is None or not module.build_info()["cuda"], reason="there are no CUDA kernels in the module")
def test_the_module_has_kernels_for_every_architecture_it_names() -> None:
    assert module is not None
    named = [int(name) for name in re.findall(r"sm_(\d+)", module.build_info()["cuda_archs"])]
    assert named
    found = fat_binaries(Path(module.__file__).read_bytes())
    assert {arch for kind, arch in found if kind == "elf"} >= set(named)
    assert all(found["elf", arch] >= len(SOURCES) for arch in named)
    assert {arch for kind, arch in found if kind == "ptx"} == {90 if 90 in named else named[-1]}, "for others"
