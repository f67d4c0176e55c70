"""Any text as a config or an option: read, or refused in one line; what is written loads back equal.

Python configs are parsed and not run, since anything could come of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from fusedopt.training.config import Config, parse_options
from fusedopt.training.config.python_files import PythonFile
from fusedopt.training.errors import ConfigError

from .watching import nothing_runs

SUFFIXES = {b"j": ".json", b"y": ".yaml", b"p": ".py"}

JSON = b"""{"_base_": [], "lr": 1e-3, "a": {"b": [1, -2.5, null, true, "x\\n\\u00fc"], "_delete_": true},
"here": "{{ fileDirname }}", "name": "{{fileBasenameNoExtension}}.pth"}"""
YAML = b"""_base_: []
model: &m {type: Net, depth: 0x1f, width: 1_000, when: 2024-01-02, on: off}
copy:
  <<: *m
  type: ~
text: |
  {{ fileBasename }}
list: [*m, 1e5, .inf, !!str 1, !!set {a, b}, ? x : y]
"""
PYTHON = b"""_base_ = ['a.py']
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr={{_base_.lr}}, betas=(0.9, 0.999)))
name = f'{{ fileDirname }}/{1 + 1}'
x = [i for i in range(3)] + '{{ _base_.list }}'
"""
OPTIONS = (b"a.b.0=1", b"a=[1,(2,'x,y'),None,true]", b'a="b', b"a=-1e-3,2", b"a==", b"a=(((1)))")


def seeds() -> Iterator[bytes]:
    """A config of each kind, and options."""
    yield from (b"j" + JSON, b"y" + YAML, b"p" + PYTHON, b"y" + yaml.safe_dump({"a": [1, {"b": "c"}]}).encode())
    yield from (b"o" + option for option in OPTIONS)


def run(data: bytes, folder: Path) -> None:
    """Read a config or an option; write it and read it again."""
    suffix = SUFFIXES.get(data[:1])
    path = folder / f"fuzzed{suffix}"
    try:
        if suffix is None:
            with nothing_runs():
                parse_options([data[1:].decode("utf-8", "surrogateescape")])
        elif suffix == ".py":
            with nothing_runs():
                PythonFile(data[1:].decode("utf-8"), path).take_bases()
        else:
            path.write_bytes(data[1:])
            with nothing_runs():
                config = Config.fromfile(path)
                text = config.pretty_text
            assert isinstance(text, str)
            config.dump(folder / f"written{suffix}")
            assert repr(Config.fromfile(folder / f"written{suffix}")) == repr(config)
    except ConfigError as error:
        message = str(error)
    except (UnicodeDecodeError, RecursionError, MemoryError):
        # Of a Python config that is not given as a file: Config.fromfile turns these into ConfigErrors.
        assert suffix == ".py"
        return
    else:
        return
    assert message.isprintable() and "\n" not in message, message
