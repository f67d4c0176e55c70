"""Watches what reading a file does besides: through Python's audit events, which a reader cannot avoid."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator

__all__ = ["nothing_runs"]

_watching = False
_seen: list[str] = []

#: Beginnings of events that running a file's code would raise. Opening for reading is allowed, and importing what the
#: reader itself needs has happened before.
_FORBIDDEN = ("exec", "import", "os.", "subprocess.", "socket.", "ctypes.dlopen", "shutil.", "tempfile.", "pickle.")
_ALLOWED = ("os.listdir", "os.scandir")


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if not _watching:
        return
    writes = event == "open" and (
        (isinstance(arguments[1], str) and any(letter in arguments[1] for letter in "wax+"))
        or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    )
    if writes or (event.startswith(_FORBIDDEN) and event not in _ALLOWED):
        _seen.append(f"{event}{arguments}"[:300])
        raise PermissionError(f"reading must not do this: {_seen[-1]}")


# What Python, torch and the readers import when they first need it: encodings of text in files and messages, the
# package that reads safetensors, and a part of torch.
for encoding in ("cp437", "raw_unicode_escape", "unicode_escape", "utf_8_sig"):
    codecs.lookup(encoding)
for module in ("safetensors.torch", "torch._subclasses.schema_check_mode"):
    with contextlib.suppress(ImportError):
        importlib.import_module(module)

sys.addaudithook(_hook)


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """Within the block no code of a file is run, nothing is imported, and no file is written; AssertionError if so."""
    global _watching
    _seen.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
        assert not _seen, _seen
