"""Reads pickles without running anything.

Note [Reading runs nothing]
A pickle is a program: it names functions and calls them. ``pickletools`` splits it into instructions, and the machine
here follows them with data only. Names are looked up in the tables of :mod:`building`, never imported. What is in
neither table becomes a :class:`StandIn`, which records the arguments, the state and the items that the object would
get. Nothing of the file is ever called, and no attribute is set on anything but a stand-in, except the versions that
torch attaches to a state dict.

Memory and time are bounded by the size of the file: storages may together not be larger than it (:mod:`files`), and
what else is copied or compared is charged to a budget. Sharing can make a small file large, and nesting exhausts the
stack of whatever walks it, so both are bounded too (:mod:`bounds`).
"""

from __future__ import annotations

import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import IO, Any

from ..errors import CheckpointError
from .bounds import checked_integer
from .building import BUILDERS, CONSTANTS, Building
from .standins import StandIn

__all__ = ["Machine"]

#: Characters of the longest name of a function.
LONGEST_NAME = 1000

#: Python 2's names of modules.
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg", "torch.tensor": "torch._tensor"}

_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    "BYTEARRAY8",
}
_STRINGS = ("STRING", "BINSTRING", "SHORT_BINSTRING")
_CONSTANT_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
_IGNORED = ("PROTO", "FRAME", "STOP")


class Machine:
    """Follows the instructions of a pickle.

    Args:
        building: the file's storages and budget.

    Attributes:
        not_built: how often each name occurs for which there are only stand-ins.
    """

    def __init__(self, building: Building):
        self.not_built: Counter[str] = Counter()
        self._building = building
        self._budget = building.budget
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, file: IO[bytes]) -> Any:
        """The value of the pickle that begins at the position of ``file``, which is then behind it.

        Raises:
            CheckpointError: it is no pickle, holds more than is allowed, or describes something that cannot be.
            Exception: with arbitrary content, ``pickletools`` can raise anything.
        """
        self._stack, self._marked, self._memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(file):
            self._follow(opcode.name, argument)
        if len(self._stack) != 1 or self._marked:
            raise CheckpointError("it ends in the middle of a value")
        return self._stack.pop()

    def _follow(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self._stack.append(checked_integer(argument))
        elif name in _CONSTANT_VALUES:
            self._stack.append(_CONSTANT_VALUES[name])
        elif name in _STRINGS:
            self._stack.append(_text(argument))
        elif name in _EMPTY:
            self._stack.append(_EMPTY[name]())
        elif name not in _IGNORED:
            method = getattr(self, f"_{name.lower()}", None)
            if method is None:
                raise CheckpointError(f"it has the instruction {name}, which no checkpoint needs")
            method() if argument is None else method(argument)

    def _pop(self) -> Any:
        if not self._stack:
            raise CheckpointError("it takes a value where there is none")
        return self._stack.pop()

    def _top(self) -> Any:
        if not self._stack:
            raise CheckpointError("it takes a value where there is none")
        return self._stack[-1]

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        if not self._marked:
            raise CheckpointError("it takes values where there are none")
        values, self._stack = self._stack, self._marked.pop()
        return values

    def _pop_mark(self) -> None:
        self._since_mark()

    def _dup(self) -> None:
        self._stack.append(self._top())

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._top()

    def _put(self, index: int) -> None:
        self._memo[index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise CheckpointError(f"it takes the value {index} again, which it does not have")
        self._stack.append(self._memo[index])

    _binput = _long_binput = _put
    _binget = _long_binget = _get

    def _tuple(self) -> None:
        values = self._since_mark()
        self._stack.append(tuple(values))

    def _last(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(values)))

    def _tuple1(self) -> None:
        self._last(1)

    def _tuple2(self) -> None:
        self._last(2)

    def _tuple3(self) -> None:
        self._last(3)

    def _list(self) -> None:
        values = self._since_mark()
        self._stack.append(values)

    def _dict(self) -> None:
        values = self._since_mark()
        self._stack.append({})
        self._set(values)

    def _frozenset(self) -> None:
        values = self._since_mark()
        self._stack.append(frozenset(self._budget.key(value, len(values)) for value in values))

    def _append(self) -> None:
        self._extend([self._pop()])

    def _appends(self) -> None:
        self._extend(self._since_mark())

    def _additems(self) -> None:
        self._extend(self._since_mark())

    def _setitem(self) -> None:
        value = self._pop()
        self._set([self._pop(), value])

    def _setitems(self) -> None:
        self._set(self._since_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if isinstance(target, StandIn):
            target.elements.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(self._budget.key(value, len(target) + len(values)) for value in values)
        else:
            raise CheckpointError(f"it appends to a {type(target).__name__}")

    def _set(self, values: list[Any]) -> None:
        target = self._top()
        entries = target.entries if isinstance(target, StandIn) else target
        if not isinstance(entries, dict) or len(values) % 2:
            raise CheckpointError(f"it sets items of a {type(target).__name__}")
        for index in range(0, len(values), 2):
            key = self._budget.key(values[index], len(entries))
            if key in entries:
                raise CheckpointError("it sets an item twice")
            entries[key] = values[index + 1]

    def _global(self, path: str) -> None:
        if len(path) > LONGEST_NAME:
            raise CheckpointError(f"it names a function by {len(path):,} characters; {LONGEST_NAME:,} are allowed")
        module, _, name = path.partition(" ")
        path = f"{_RENAMED.get(module, module)}.{name}"
        if path in CONSTANTS:
            self._stack.append(CONSTANTS[path])
            return
        if path not in BUILDERS:
            self.not_built[path] += 1
        self._stack.append(StandIn(path))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise CheckpointError("it names a function by something other than text")
        if len(module) + len(name) > LONGEST_NAME:
            raise CheckpointError(f"it names a function by more than {LONGEST_NAME:,} characters")
        self._global(f"{module} {name}")

    def _ext1(self, code: int) -> None:
        self._global(f"copyreg extension {code}")

    _ext2 = _ext4 = _ext1

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple):
            raise CheckpointError(f"it calls with a {type(arguments).__name__} instead of arguments")
        builder = None
        if isinstance(function, StandIn) and function.arguments is None:
            builder = BUILDERS.get(function.name)
        if builder is not None:
            for argument in arguments:
                self._budget.charge_copy(argument)
            built = builder(self._building, *arguments)
            self._stack.append(StandIn(function.name, arguments) if built is NotImplemented else built)
        else:
            self._stack.append(StandIn(getattr(function, "name", type(function).__name__), arguments))

    def _reduce(self) -> None:
        arguments = self._pop()
        self._call(self._pop(), arguments)

    _newobj = _reduce

    def _newobj_ex(self) -> None:
        named, arguments, function = self._pop(), self._pop(), self._pop()
        if not isinstance(arguments, tuple):
            raise CheckpointError(f"it calls with a {type(arguments).__name__} instead of arguments")
        # No builder takes named arguments.
        self._stack.append(StandIn(getattr(function, "name", type(function).__name__), arguments, named))

    def _inst(self, path: str) -> None:
        arguments = tuple(self._since_mark())
        self._global(path)
        self._call(self._pop(), arguments)

    def _obj(self) -> None:
        function, *arguments = self._since_mark() or [None]
        self._call(function, tuple(arguments))

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, StandIn):
            target.state = state if target.state is None else (target.state, state)
        elif isinstance(target, OrderedDict):
            target._metadata = _versions(state)  # type: ignore[attr-defined]
        # Other plain values have no state; what a file gives them is dropped.

    def _binpersid(self) -> None:
        self._stack.append(self._building.stored(self._pop()))

    def _persid(self, text: str) -> None:
        raise CheckpointError(f"it refers to {text!r} outside the file")


def _versions(state: Any) -> dict[str, dict[str, int]]:
    """The versions of modules in the attributes of a state dict; torch obeys other things there, too."""
    noted = state.get("_metadata") if isinstance(state, dict) else None
    found = {}
    for name, about in noted.items() if isinstance(noted, dict) else ():
        version = about.get("version") if isinstance(about, dict) else None
        if isinstance(name, str) and type(version) is int:
            found[name] = {"version": version}
    return found


def _text(value: str) -> str | bytes:
    """A string of Python 2, which may have been text or bytes."""
    value_bytes = value.encode("latin-1")
    try:
        return value_bytes.decode()
    except UnicodeDecodeError:
        return value_bytes
