"""The package itself: layers, the compiled module and what is missing without it, the build."""

from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import HAS_EMULATOR, module

import fusedopt
from fusedopt.backends import BACKENDS, native
from fusedopt.cli import info
from fusedopt.rules import CLIP_EPS, RULES, codes

ROOT = Path(fusedopt.__file__).resolve().parent
REPOSITORY = Path(__file__).resolve().parent.parent

#: From the bottom up: a module may import from its own layer and those before it.
LAYERS = [
    ["version"],
    ["messages", "undo"],
    ["rules", "shards"],
    ["backends"],
    ["optimizers"],
    ["amp"],
    ["training"],
    ["integrations"],
    ["bench"],
    ["compare"],
    ["cli", "__main__"],
]
#: The same within fusedopt.training.
TRAINING_LAYERS = [
    ["errors", "files", "registry", "portable", "sharding", "unwrapping"],
    ["reading"],
    ["optimizers", "zero"],
    ["wrappers"],
    ["constructors"],
    ["builder"],
    ["schedulers", "averaging", "config"],
    ["engine"],
]


def internal_imports(path: Path) -> set[tuple[str, ...]]:
    """Modules of fusedopt, without its name, that a module imports from, inside functions too."""
    package = ["fusedopt", *path.relative_to(ROOT).parts[:-1]]
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = [*base, *(node.module.split(".") if node.module else [])]
            if target[:1] == ["fusedopt"]:
                found |= {(*target[1:], alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                tuple(name.split(".")[1:]) for alias in node.names if (name := alias.name).startswith("fusedopt.")
            }
    return found


@pytest.mark.parametrize(
    ("folder", "layers"), [((), LAYERS), (("training",), TRAINING_LAYERS)], ids=["all", "training"]
)
def test_imports_point_down(folder: tuple[str, ...], layers: list[list[str]]) -> None:
    level = {name: number for number, names in enumerate(layers) for name in names}
    root, depth = ROOT.joinpath(*folder), len(folder)
    modules = [path for path in root.rglob("*.py") if path != root / "__init__.py"]
    assert len(modules) > 20
    assert {path.relative_to(root).parts[0].removesuffix(".py") for path in modules} == set(level)
    for path in modules:
        layer = path.relative_to(root).parts[0].removesuffix(".py")
        for target in internal_imports(path):
            if target[:depth] != folder or target[depth] in ("_C", layer):
                continue
            assert level[target[depth]] <= level[layer], f"{path.relative_to(ROOT)} imports {target}, which is above it"


def test_the_optimizer_knows_no_registry() -> None:
    for folder in ("messages", "rules", "shards", "backends", "optimizers"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "training" not in {target[0] for target in internal_imports(path)}, path


def test_files_are_short_or_say_why_not() -> None:
    """One thing per file. Tests may be longer: a file of them is the specification of one part."""
    if not (REPOSITORY / "csrc").exists():
        pytest.skip("not in a source tree")
    for folder, most in (("fusedopt", 400), ("csrc", 400), ("benchmarks", 400), (".ci", 400), ("tests", 1000)):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.suffix in (".py", ".pyi", ".h", ".cpp", ".cu") and "__pycache__" not in path.parts:
                lines = path.read_text().split("\n")
                assert len(lines) <= most + 1 or "Long because" in "\n".join(lines[:10]), f"{path}: {len(lines)} lines"


def test_importing_starts_nothing_and_probes_no_third_party_library() -> None:
    code = (
        "import sys, threading, torch; before = set(sys.modules); import fusedopt; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "assert threading.active_count() == 1; "
        "print(sorted(new & {'mmengine', 'sklearn', 'matplotlib', 'rich', 'triton', 'yaml', 'tensorboard'}))"
    )
    assert run_python(code).stdout.strip() == "[]"


def run_python(code: str, check: bool = True, path: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **env}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    cwd = path or Path(sys.prefix)  # not the repository, whose package would come first
    result = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], env=environment, capture_output=True, text=True, cwd=cwd
    )
    assert not check or result.returncode == 0, result.stderr
    return result


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """A copy of the Python sources without the compiled module; returns the folder to put on the path."""
    shutil.copytree(ROOT, tmp_path / "fusedopt", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def names_in_stub(body: list[ast.stmt], prefix: str = "") -> dict[str, list[str] | None]:
    """Every public name in a stub, dotted, with the parameters of a function."""
    found: dict[str, list[str] | None] = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[prefix + node.target.id] = None
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found[prefix + node.name] = None
            found |= names_in_stub(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            parameters = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
            is_property = any(isinstance(mark, ast.Name) and mark.id == "property" for mark in node.decorator_list)
            found[prefix + node.name] = None if is_property else parameters
    return found


def names_in_module(thing: Any, prefix: str = "") -> dict[str, list[str] | None]:
    """The same of the module itself. pybind11 writes the signature of a function into its docstring."""
    found: dict[str, list[str] | None] = {}
    for name, value in vars(thing).items():
        signature = re.match(rf"{name}\((.*)\) -> ", getattr(value, "__doc__", None) or "")
        if name.startswith("_") and signature is None:
            continue
        found[prefix + name] = re.findall(r"(\w+): ", signature[1]) if signature else None
        if isinstance(value, (type, ModuleType)):
            found |= names_in_module(value, f"{prefix}{name}.")
    return found


TRAIN = """
import torch, fusedopt
param = torch.nn.Parameter(torch.zeros(3))
optimizer = fusedopt.FusedAdamW([param], lr=0.1, clip_grad=dict(max_norm=1.0))
param.grad = torch.ones(3)
optimizer.step(grad_scale=2.0)
print(fusedopt.__file__, optimizer.backend_in_use, param.tolist())
"""


def test_without_the_compiled_module_the_reference_serves_and_it_is_said_once(copied_package: Path) -> None:
    result = run_python(TRAIN + "fusedopt.FusedSGD([param], lr=0.1)", path=copied_package)
    assert str(copied_package) in result.stdout
    assert "reference [-0.1" in result.stdout
    assert result.stderr.count("fusedopt._C is not built") == 1
    assert "pip install" in result.stderr
    listed = run_python("from fusedopt.cli.info import info; print(info())", path=copied_package).stdout
    assert "absent: the compiled module fusedopt._C is not built" in listed


def test_a_module_built_for_another_torch_says_how_to_rebuild(copied_package: Path) -> None:
    if module is None:
        pytest.skip("the compiled module is not built")
    built = Path(module.__file__)
    stamp = f"fusedopt built for torch {torch.__version__};".encode()
    other = stamp.replace(torch.__version__.encode(), ("9" + torch.__version__[1:]).encode())
    assert built.read_bytes().count(stamp) == 1
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    (copied_package / "fusedopt" / name).write_bytes(built.read_bytes().replace(stamp, other))
    result = run_python("import fusedopt", check=False, path=copied_package)
    assert result.returncode != 0
    assert f"built for torch 9{torch.__version__[1:]} but torch {torch.__version__} is installed" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr


def test_a_module_that_does_not_load_says_how_to_rebuild(copied_package: Path) -> None:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    stamp = f"fusedopt built for torch {torch.__version__}; C++11 ABI 1;".encode()
    (copied_package / "fusedopt" / f"_C{suffix}").write_bytes(b"not an ELF file " + stamp)
    result = run_python("import fusedopt", check=False, path=copied_package)
    assert "fusedopt._C cannot be loaded" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr


@pytest.mark.skipif(module is None, reason="the compiled module is not built")
class TestCompiledModule:
    def test_it_has_kernels_for_every_rule(self) -> None:
        assert module.rule_names() == list(RULES)

    def test_constants_written_in_both_languages_are_equal(self) -> None:
        assert module.CLIP_EPS == CLIP_EPS
        assert module.RANDOM == (codes.RANDOM_ROUNDS, codes.RANDOM_COLUMNS)
        assert (codes.CODE_BLOCK, tuple(codes.SIGNED), tuple(codes.UNSIGNED)) == module.CODES

    def test_its_stub_has_its_names_and_parameters(self) -> None:
        stub = names_in_stub(ast.parse((ROOT / "_C.pyi").read_text()).body)
        if not HAS_EMULATOR:
            stub = {name: value for name, value in stub.items() if name.split(".")[0] not in ("emulator", "ptx")}
        assert stub == names_in_module(module)

    def test_it_says_what_it_was_built_with(self) -> None:
        build = module.build_info()
        assert build["torch"] == torch.__version__
        assert build["compiler"]
        assert build["build_type"] in ("Release", "RelWithDebInfo", "Debug")
        assert build["cuda"] is None or float(build["cuda"]) >= 11

    def test_the_instruction_set_can_be_forced(self) -> None:
        code = "from fusedopt import _C; print(_C.cpu_isa())"
        for isa in module.cpu_isas():
            assert run_python(code, FUSEDOPT_CPU_ISA=isa).stdout.strip() == isa
        refused = run_python(code, check=False, FUSEDOPT_CPU_ISA="sse9")
        assert "'sse9' is not available; expected one of baseline" in refused.stderr

    def test_it_needs_no_cuda_library(self) -> None:
        """CUDA is linked statically: the module must import on a machine without it."""
        readelf = shutil.which("readelf")
        if readelf is None:
            pytest.skip("readelf is not installed")
        dynamic = subprocess.run([readelf, "-d", module.__file__], capture_output=True, text=True, check=True).stdout
        assert "libtorch_cpu.so" in dynamic
        assert "libcuda" not in dynamic
        assert "torch_cuda" not in dynamic

    def test_no_kernel_is_shared_between_instruction_sets(self) -> None:
        """An inline function merged by the linker could carry AVX-512 into the baseline."""
        nm = shutil.which("nm")
        if nm is None:
            pytest.skip("nm is not installed")
        for objects in (REPOSITORY / "build").glob("cmake/CMakeFiles/fusedopt_kernels.dir/csrc/cpu/*.o"):
            symbols = subprocess.run([nm, objects], capture_output=True, text=True, check=True).stdout.split("\n")
            assert [line for line in symbols if " W " in line or " V " in line] == []


def test_an_unknown_build_type_is_refused_with_those_there_are(tmp_path: Path) -> None:
    if not (REPOSITORY / "csrc").exists():
        pytest.skip("not in a source tree")
    environment = {**os.environ, "FUSEDOPT_BUILD_TYPE": "Fast", "FUSEDOPT_BUILD_DIR": str(tmp_path)}
    command = [sys.executable, "csrc/build.py"]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    said = " ".join(result.stderr.split())
    assert "FUSEDOPT_BUILD_TYPE is 'Fast'; expected Release, RelWithDebInfo or Debug" in said


def test_info_lists_every_backend_and_why_it_is_unavailable() -> None:
    text = info.info()
    assert torch.__version__ in text
    for name in BACKENDS:
        assert f"backend {name} on cpu" in text
    assert native.NativeBackend.unavailable(torch.device("meta")) == "this build has no kernels for meta tensors"


def test_the_sdist_has_all_that_a_build_reads(tmp_path: Path) -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not in a clone")
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    needed = {name for name in tracked.split("\n") if name.startswith(("csrc/", "fusedopt/"))}
    for name in [*needed, "setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"]:
        if (REPOSITORY / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, tmp_path / name)
    code = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    built = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        there = {name.partition("/")[2] for name in files.getnames()}
    assert needed - there == set()


def test_prefetches_are_in_the_module() -> None:
    # See Note [Prefetching]: the compiler may drop them without a word, and only cold steps would tell.
    if platform.machine() != "x86_64" or shutil.which("objdump") is None:
        pytest.skip("needs objdump and x86-64")
    if module is None or module.build_info()["build_type"] == "Debug":
        pytest.skip("needs a compiled module that is optimized")
    assert fusedopt._C.__file__ is not None
    if Path(fusedopt._C.__file__).name.startswith("_C_torch"):
        pytest.skip("the modules of a wheel have no symbols")
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", fusedopt._C.__file__], capture_output=True, text=True, check=True
    ).stdout
    functions = re.split(r"\n\n[0-9a-f]+ <", listing)
    for name in (
        "plan::Groups::unchanged(",
        "plan::Rows::look(",
        "plan::Rows::count_up(",
        "plan::States::look(",
        "cpu::update(",
        "cpu::statistics(",
    ):
        bodies = [body for body in functions if body.startswith(f"fusedopt::{name}")]
        assert bodies, name
        assert any("prefetch" in body for body in bodies), name
