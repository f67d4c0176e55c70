"""``python -m fuzz checkpoints --seconds 3600``: fuzz a target; what it finds is written to the folder."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from pathlib import Path

import atheris


def main() -> None:
    """Fuzz until the time is over, or until an input is found that should not be."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=main.__doc__)
    parser.add_argument("target", choices=("checkpoints", "configs", "state_dicts"))
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("work_dirs/fuzz"), help="for inputs and findings")
    parser.add_argument("--reproduce", type=Path, help="run this input only")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    modules = {"checkpoints": ["fusedopt.training.reading"], "configs": ["fusedopt.training.config"]}
    with atheris.instrument_imports(include=modules.get(arguments.target, ["fusedopt.optimizers.loading"])):
        target = importlib.import_module(f"fuzz.{arguments.target}")
    folder = arguments.folder / arguments.target
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    if arguments.reproduce:
        target.run(arguments.reproduce.read_bytes(), folder)
        return
    for number, data in enumerate(target.seeds()):
        (corpus / f"seed{number}").write_bytes(data)
        target.run(data, folder)  # imports whatever the reader imports when it is first used
    options = [
        *(f"-max_total_time={arguments.seconds}", f"-seed={arguments.seed}", "-timeout=10", "-rss_limit_mb=4096"),
        *("-max_len=8192", f"-artifact_prefix={folder}/", "-print_final_stats=1", str(corpus)),
    ]
    atheris.Setup([sys.argv[0], *options], lambda data: target.run(data, folder))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
