"""CONTRIBUTING.md's "Add an optimizer", followed word by word in a copy of the tree: built, tested and linted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "CONTRIBUTING.md"
#: The page says that these are optional.
OPTIONAL = {"fusedopt/backends/triton_kernels/rules/lion.py"}
#: Where tests are parametrized over rules, optimizers or their options.
ENUMERATING = (
    *("steps", "amp", "around_the_optimizer", "bad_input", "cuda", "gpu_smoke", "loading", "numbers", "plan"),
    *("selftest", "triton"),
)


class Recipe(NamedTuple):
    """What the page's blocks are: new files, edits as (path, old lines, new lines), and what is run at the end."""

    files: dict[str, str]
    edits: list[tuple[str, str, str]]
    snippet: str


def read_recipe() -> Recipe:
    """Blocks under a heading with a path are that file; a diff names its file; what follows is run."""
    section = PAGE.read_text().partition("\n## Add an optimizer\n")[2].partition("\n## ")[0]
    recipe = Recipe({}, [], "")
    heading = ""
    for title, language, block in re.findall(
        r"^### ([^\n]*)$|^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL
    ):
        path = re.fullmatch(r"`(\S+)`", heading)
        if title:
            heading = title
        elif language == "diff":
            first, _, rest = block.partition("\n")
            for hunk in rest.split("@@\n"):
                lines = hunk.splitlines(keepends=True)
                old, new = ("".join(line[1:] for line in lines if line[0] in " " + sign) for sign in "-+")
                recipe.edits.append((first.removeprefix("--- "), old, new))
        elif path:
            assert path[1] not in recipe.files, f"two blocks for {path[1]}"
            recipe.files[path[1]] = block
        else:
            recipe = recipe._replace(snippet=recipe.snippet + block)
    return recipe


RECIPE = read_recipe()


def test_it_is_four_new_files_and_three_edited_ones() -> None:
    required = [path for path in RECIPE.files if path not in OPTIONAL]
    assert len(required) == 4
    assert len({path for path, _, _ in RECIPE.edits}) == 3
    assert set(RECIPE.files) > OPTIONAL
    assert RECIPE.snippet


def test_its_edits_fit_the_tree() -> None:
    for path in RECIPE.files:
        assert not (REPOSITORY / path).exists(), f"{path} is there already"
        assert (REPOSITORY / path).parent.is_dir()
    for path, old, _ in RECIPE.edits:
        assert (REPOSITORY / path).read_text().count(old) == 1, f"{path} does not have once:\n{old}"


def run(tree: Path, *command: str, **environment: str) -> str:
    """The output of a command in the tree, whose package and tests are found first."""
    env = {**os.environ, **environment, "PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        command, cwd=tree, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-6000:]}"
    return done.stdout


def run_tests(tree: Path, *arguments: str) -> int:
    """Run pytest in the tree; the number of tests that have passed."""
    output = run(tree, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    passed = re.search(r"(\d+) passed", output)
    assert passed, output
    return int(passed[1])


def tool(name: str) -> str:
    """A program that is installed beside this Python."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git knows of the repository, with the recipe applied, and built."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not in a git checkout")
    tree = tmp_path_factory.mktemp("recipe") / "fusedopt"
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, tree / name)
    for name, content in RECIPE.files.items():
        (tree / name).write_text(content)
    for name, old, new in RECIPE.edits:
        (tree / name).write_text((tree / name).read_text().replace(old, new))
    run(tree, sys.executable, "csrc/build.py", FUSEDOPT_CUDA="0", FUSEDOPT_EMULATOR="1", FUSEDOPT_WERROR="1")
    return tree


@pytest.mark.slow
@pytest.mark.full
class TestInACopy:
    def test_its_own_example_runs(self, tree: Path) -> None:
        run(tree, sys.executable, "-W", "error", "-c", RECIPE.snippet)

    def test_the_tests_that_enumerate_optimizers_pass(self, tree: Path) -> None:
        files = [f"tests/test_{name}.py" for name in ENUMERATING]
        assert run_tests(tree, "-m", "not slow", "-k", "lion", *files) > 150

    def test_random_steps_follow_the_formula(self, tree: Path) -> None:
        assert run_tests(tree, "tests/test_fuzz.py", "-k", "any_sequence") == 1

    def test_the_package_is_whole(self, tree: Path) -> None:
        assert run_tests(tree, "-m", "not slow", "tests/test_package.py", "tests/test_docs.py") > 20
        listed = run(tree, sys.executable, "-m", "fusedopt", "info")
        assert "sgd, adam, lion" in listed

    def test_gpu_compilers_take_it(self, tree: Path) -> None:
        """nvcc, if it is there, and Triton's: no spills, whole vectors, nothing contracted."""
        assert run_tests(tree, "tests/test_ptxas.py") > 0
        assert run_tests(tree, "tests/test_triton_compiled.py", "-k", "TestCompiled and cuda-80") == 3

    @pytest.mark.parametrize(
        "command", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)], ids=" ".join
    )
    def test_the_python_files_are_clean(self, tree: Path, command: tuple[str, ...]) -> None:
        run(tree, tool(command[0]), *command[1:])

    def test_the_header_is_formatted(self, tree: Path) -> None:
        headers = [path for path in RECIPE.files if path.endswith(".h")]
        run(tree, tool("clang-format"), "--dry-run", "-Werror", *headers, "csrc/rules/rules.h")

    def test_without_the_optional_file_others_serve(self, tree: Path, tmp_path: Path) -> None:
        without = tmp_path / "fusedopt"
        shutil.copytree(tree, without, ignore=shutil.ignore_patterns("build", "__pycache__"))
        for path in OPTIONAL:
            (without / path).unlink()
        run(without, sys.executable, "-W", "error", "-c", RECIPE.snippet)
        files = [f"tests/test_{name}.py" for name in ("steps", "selftest", "numbers", "triton")]
        assert run_tests(without, "-m", "not slow", "-k", "lion", *files) > 50
        asked = "import fusedopt, torch; fusedopt.FusedLion([torch.nn.Parameter(torch.ones(1))], backend='triton')"
        refused = subprocess.run(
            [sys.executable, "-c", asked],
            cwd=without,
            env={**os.environ, "PYTHONPATH": str(without), "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if "triton is not installed" not in refused.stderr:
            assert "backend 'triton' is not available: triton has no kernels for the rule lion" in refused.stderr
