"""The command `fusedopt bench`."""

from __future__ import annotations

import itertools

import pytest
import torch
from bench_cases import (
    ELSEWHERE,
    TINY,
    Failing,
    SecondStepForgotten,
    _one_thread,  # noqa: F401  a fixture
    _short_collections,  # noqa: F401  a fixture
    install,  # noqa: F401  a fixture
    register,  # noqa: F401  a fixture
    table_of,
)
from test_cli import mistake

from fusedopt.bench import CONTENDERS, DTYPES, GROUPINGS, OPTIMIZERS, RECIPES, WORKLOADS
from fusedopt.bench import measure as measure_module
from fusedopt.bench.contenders import OURS, RIVAL
from fusedopt.bench.workloads import Workload
from fusedopt.cli import main


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small workload by name, and a small cache to flush."""
    monkeypatch.setitem(WORKLOADS, "tiny", Workload("for tests", lambda: TINY))
    monkeypatch.setattr(measure_module, "_last_level_cache", lambda: 4096)


def bench(*arguments: str) -> int:
    return main(["bench", "--workload", "tiny", "--rounds", "2", "--threads", "1", *arguments])


def tables_of(text: str) -> list[str]:
    """The headline of each case, up to the colon."""
    return [line.partition(":")[0] for line in text.splitlines() if " to move; " in line]


class TestCommand:
    def test_list(self, capsys):
        assert main(["bench", "--list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        words = {line.split()[0]: line for line in lines}
        for name, workload in WORKLOADS.items():
            assert workload.description in words[name]
            assert words[name].endswith(" (for GPUs)") == workload.gpu_only
        for name, contender in CONTENDERS.items():
            assert words[name].endswith(contender.description)
        for names in (GROUPINGS, OPTIMIZERS, RECIPES, DTYPES):
            assert f"  {', '.join(names)}" in lines

    def test_a_small_run(self, capsys):
        assert main(["bench", "--workload", "400x64", "--rounds", "2", "--contender", OURS, "--contender", RIVAL]) == 0
        output = capsys.readouterr()
        assert output.err == ""
        assert output.out.startswith("400x64/one/adamw/amp-clip: 400 tensors in 1 group, 25,600 parameters, ")
        assert "cold caches, 2 rounds" in output.out
        head, rows, rest = table_of(output.out)
        assert head == ["contender", "median", "p10 – p90", f"× {OURS} [95 %]", "extra memory"]
        assert sorted(row[0] for row in rows) == [OURS, RIVAL]
        assert rest == []

    @pytest.mark.usefixtures("quick")
    def test_usual_contenders(self, capsys):
        assert bench("--grouping", "two", "--warm") == 0
        output = capsys.readouterr().out
        assert tables_of(output) == ["tiny/two/adamw/amp-clip/warm"]
        stock = [name for name in CONTENDERS if name.startswith("torch-") and not name.endswith("-in-backward")]
        names = [OURS, *(name for name in stock if name not in ELSEWHERE)]
        _, rows, rest = table_of(output)
        assert sorted(row[0] for row in rows) == sorted(names)
        assert rest == []

    @pytest.mark.usefixtures("quick")
    def test_usual_contenders_that_cannot_take_part_are_not_missed(self, capsys):
        assert bench("--dtype", "fp16") == 0
        _, rows, rest = table_of(capsys.readouterr().out)
        assert [row[0] for row in rows] == [OURS]
        assert rest == []

    @pytest.mark.usefixtures("quick")
    def test_repeated_options_are_combined(self, capsys):
        options = {
            "grouping": ["one", "each"],
            "optimizer": ["sgd", "adam"],
            "recipe": ["bare", "clip"],
            "dtype": ["fp32", "bf16"],
        }
        arguments = [word for option, values in options.items() for value in values for word in (f"--{option}", value)]
        assert bench(*arguments, "--contender", OURS, "--contender", OURS) == 0
        output = capsys.readouterr().out
        assert tables_of(output) == [
            "/".join(["tiny", *parts]).removesuffix("/fp32") for parts in itertools.product(*options.values())
        ]
        assert output.count(f"| {OURS} ") == 16

    @pytest.mark.usefixtures("quick")
    def test_all_contenders(self, capsys, install, monkeypatch):
        for name in ("torch-compiled", "torchao", "torchao-8bit", "deepspeed"):
            monkeypatch.setattr(CONTENDERS[name], "unavailable", classmethod(lambda cls, case: "slow"))
        for package in ("optimi", "bitsandbytes", "flashoptim", "mmengine"):
            install(package, False)
        assert bench("--contender", "all") == 0
        _, rows, rest = table_of(capsys.readouterr().out)
        missing = {line.split(": ")[1]: line.split(": ", 2)[2] for line in rest}
        there = [row[0].removesuffix(" (approximate)") for row in rows]
        assert sorted([*missing, *there]) == sorted(CONTENDERS)
        assert missing["optimi"] == "the package optimi is not installed"
        assert missing["torch-merged"] == "there is one group"

    @pytest.mark.usefixtures("quick")
    def test_a_contender_that_is_not_installed(self, capsys, install):
        install("optimi", False)
        assert bench("--contender", OURS, "--contender", "optimi") == 1
        _, rows, rest = table_of(capsys.readouterr().out)
        assert [row[0] for row in rows] == [OURS]
        assert rest == ["left out: optimi: the package optimi is not installed"]

    @pytest.mark.usefixtures("quick")
    def test_nobody_is_here(self, capsys, install):
        install("optimi", False)
        assert bench("--contender", "optimi") == 1
        assert capsys.readouterr().out.endswith("\n\nleft out: optimi: the package optimi is not installed\n\n")

    @pytest.mark.usefixtures("quick")
    @pytest.mark.parametrize("named", [True, False])
    def test_a_wrong_result(self, capsys, register, named):
        wrong = register("torch-wrong", SecondStepForgotten)
        assert bench(*(["--contender", OURS, "--contender", wrong] if named else [])) == 1
        _, rows, rest = table_of(capsys.readouterr().out)
        assert wrong not in [row[0] for row in rows]
        assert any(line.startswith("left out: torch-wrong: wrong result: ") for line in rest)

    @pytest.mark.usefixtures("quick")
    def test_a_fault_of_ours_is_not_hidden(self, register):
        with pytest.raises(RuntimeError, match="no luck"):
            bench("--contender", register("fusedopt-failing", Failing))

    @pytest.mark.parametrize(
        ("option", "known"),
        [
            ("workload", WORKLOADS),
            ("grouping", GROUPINGS),
            ("optimizer", OPTIMIZERS),
            ("recipe", RECIPES),
            ("dtype", DTYPES),
            ("contender", CONTENDERS),
        ],
    )
    def test_unknown_names(self, capsys, option, known):
        error = mistake(capsys, "bench", f"--{option}", "nope")
        assert option in error and "nope" in error
        assert error.endswith(f"one of {', '.join(known)}\n")

    def test_one_unknown_name_among_others(self, capsys):
        assert "'nope'" in mistake(capsys, "bench", "--recipe", "bare", "--recipe", "nope")
        assert "nope" in mistake(capsys, "bench", "--contender", OURS, "--contender", "nope")

    def test_no_cuda(self, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        error = mistake(capsys, "bench", "--device", "cuda")
        assert error == "fusedopt: --device cuda: torch finds no usable CUDA device here\n"

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--rounds", "1"], "argument --rounds: '1' is not a whole number above 1"),
            (["--rounds", "0"], "argument --rounds: '0' is not a whole number above 1"),
            (["--rounds", "many"], "argument --rounds: 'many' is not a whole number above 1"),
            (["--threads", "0"], "argument --threads: '0' is not a whole number above 0"),
            (["--device", "gpu"], "argument --device: invalid choice: 'gpu'"),
            (["--contender"], "argument --contender: expected one argument"),
        ],
    )
    def test_arguments(self, capsys, argv, message):
        error = mistake(capsys, "bench", *argv)
        assert message in error
        assert "--help" in error

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as exit:
            main(["bench", "--help"])
        assert exit.value.code == 0
        assert "usage: fusedopt bench" in capsys.readouterr().out
