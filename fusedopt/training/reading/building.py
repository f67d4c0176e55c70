"""What a read file may build: tensors, plain values, and no other object.

Both tables are complete: a name that is in neither becomes a :class:`StandIn`; see Note [Reading runs nothing].
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .bounds import Budget
from .standins import StandIn

__all__ = ["BUILDERS", "CONSTANTS", "Building", "Storage", "StorageType"]


@dataclass(frozen=True)
class StorageType:
    """A class of storages: the dtype of its elements, or None for bytes."""

    dtype: torch.dtype | None

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return 1 if self.dtype is None else self.dtype.itemsize


@dataclass(eq=False, repr=False)
class Storage:
    """Bytes of a file that tensors look into."""

    bytes: torch.UntypedStorage
    dtype: torch.dtype | None


def _sparse_tensor(indices: Tensor, values: Tensor, size: torch.Size, check_invariants: bool) -> Tensor:
    with warnings.catch_warnings():
        # torch 2.11 says so even if it was told whether to check.
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled", UserWarning)
        return torch.sparse_coo_tensor(indices, values, size, check_invariants=check_invariants)


class Building:
    """What the builders need of the file that is read.

    Args:
        stored: the storage for a reference to one.
        budget: what reading may cost.
    """

    def __init__(self, stored: Callable[[Any], Storage | StandIn], budget: Budget):
        self.stored = stored
        self.budget = budget
        self._sparse: list[tuple[Tensor, bool]] = []

    def sparse(self, indices: Tensor, values: Tensor, size: torch.Size, coalesced: bool) -> Tensor:
        """A sparse tensor; :meth:`finish` checks its indices, since they may not have been read yet."""
        tensor = _sparse_tensor(indices, values, size, check_invariants=False)
        self._sparse.append((tensor, coalesced))
        return tensor

    def finish(self) -> None:
        """Check what could not be checked before all storages were read."""
        for tensor, coalesced in self._sparse:
            indices, values, size = tensor._indices(), tensor._values(), tensor.size()
            checked = _sparse_tensor(indices, values, size, check_invariants=True)
            if coalesced:
                if not torch.equal(checked.coalesce().indices(), indices):
                    raise CheckpointError("it has a sparse tensor whose indices are not in order")
                tensor._coalesced_(True)


def _whole_numbers(values: Any) -> tuple[int, ...]:
    values = tuple(values) if isinstance(values, (list, tuple)) else (values,)
    if not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise CheckpointError("it has a tensor with an invalid offset, shape or strides")
    return values


def _tensor(
    building: Building,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    *more: Any,
) -> Any:
    """``torch._utils._rebuild_tensor`` and its second and third version."""
    if not isinstance(storage, Storage):
        raise CheckpointError("it has a tensor without storage")
    third = bool(more) and isinstance(more[0], torch.dtype)
    dtype = more[0] if third else storage.dtype
    metadata = next(iter(more[1:] if third else more), None)
    (offset,), size, stride = _whole_numbers(offset), _whole_numbers(size), _whole_numbers(stride)
    if dtype is None or len(size) != len(stride) or len(size) > 64:
        raise CheckpointError(f"it has a tensor of {dtype} with {len(size)} dimensions and {len(stride)} strides")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and (last + 1) * dtype.itemsize > storage.bytes.nbytes():
        raise CheckpointError(f"it has a tensor of shape {size} that reaches beyond its storage")
    tensor = torch.empty(0, dtype=dtype, device="cpu").set_(storage.bytes, offset, size, stride)
    if isinstance(metadata, dict):
        tensor = tensor.conj() if metadata.get("conj") is True else tensor
        tensor = torch._neg_view(tensor) if metadata.get("neg") is True else tensor
    return tensor.requires_grad_(requires_grad is True)


def _parameter(_: Building, data: Any, requires_grad: Any = True, *more: Any) -> Any:
    """``torch._utils._rebuild_parameter``; hooks and attributes are dropped."""
    return torch.nn.Parameter(data, requires_grad is True) if isinstance(data, Tensor) else NotImplemented


def _subclass(building: Building, function: Any, kind: Any, arguments: Any, *state: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2``: the tensor without its class and attributes, if it is a whole one."""
    builder = BUILDERS.get(function.name) if isinstance(function, StandIn) else None
    return NotImplemented if builder is None else builder(building, *arguments)


def _is_whole(tensor: Any) -> bool:
    """Whether a tensor has no more elements than its storage, which is not larger than the file."""
    return isinstance(tensor, Tensor) and tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def _sparse(building: Building, layout: Any, data: Any) -> Any:
    indices, values, size, *coalesced = data
    if layout is not torch.sparse_coo or not _is_whole(indices) or not _is_whole(values):
        return NotImplemented
    return building.sparse(indices, values, torch.Size(_whole_numbers(size)), coalesced[:1] == [True])


def _moved(_: Building, data: Any, dtype: Any, *more: Any) -> Any:
    """``torch._utils._rebuild_device_tensor_from_cpu_tensor``, left on the CPU. torch writes one dtype twice."""
    return data if isinstance(data, Tensor) and data.dtype == dtype else NotImplemented


def _layout(_: Building, name: Any) -> Any:
    layouts = {str(each): each for each in (torch.strided, torch.sparse_coo)}
    return layouts.get(name, NotImplemented)


def _pairs(building: Building, pairs: Any = ()) -> Any:
    """An ``OrderedDict``, from a list of pairs in Python 2's files."""
    return OrderedDict((building.budget.key(key, len(pairs)), value) for key, value in pairs)


def _counts(_: Building, counts: Any = None) -> Any:
    return Counter(counts) if counts is None or isinstance(counts, dict) else NotImplemented


def _without_default(_: Building, *factory: Any) -> dict[Any, Any]:
    """A dict in place of a ``defaultdict``."""
    return {}


def _set(building: Building, items: Any = ()) -> Any:
    return {building.budget.key(item, len(items)) for item in items} if isinstance(items, list) else NotImplemented


def _frozenset(building: Building, items: Any = ()) -> Any:
    built = _set(building, items)
    return built if built is NotImplemented else frozenset(built)


def _encoded(_: Building, text: Any, encoding: Any = "latin1") -> Any:
    """``_codecs.encode``, with which bytes are written in old protocols."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        return NotImplemented
    return text.encode("latin-1")


def _no_bytes(_: Building, *content: Any) -> Any:
    """How old protocols write empty ``bytes``."""
    return NotImplemented if content else b""


def _bytearray(_: Building, content: Any = b"", encoding: Any = "latin-1") -> Any:
    if isinstance(content, str) and encoding in ("latin1", "latin-1"):
        content = content.encode("latin-1")
    return bytearray(content) if isinstance(content, (bytes, bytearray)) else NotImplemented


def _complex(_: Building, real: Any = 0.0, imaginary: Any = 0.0) -> Any:
    both = all(isinstance(part, (int, float)) for part in (real, imaginary))
    return complex(real, imaginary) if both else NotImplemented


def _size(_: Building, sizes: Any = ()) -> torch.Size:
    return torch.Size(_whole_numbers(sizes))


def _device(_: Building, *place: Any) -> Any:
    return torch.device(*place)


def _number(_: Building, kind: Any, content: Any = b"") -> Any:
    """A number of NumPy as one of Python."""
    code = kind.arguments[0] if isinstance(kind, StandIn) and kind.name == "numpy.dtype" and kind.arguments else None
    dtype = _NUMPY.get(code) if isinstance(code, str) else None
    content = content.encode() if isinstance(content, str) else content  # Python 2's bytes that are valid UTF-8
    if dtype is None or not isinstance(content, bytes) or len(content) != dtype.itemsize:
        return NotImplemented
    order = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else "<"
    if order == ">":
        content = content[::-1]
    return torch.frombuffer(bytearray(content), dtype=dtype).item()


def _nothing(_: Building, *arguments: Any) -> Any:
    """For classes that occur as arguments of the others, and whose objects are not built."""
    return NotImplemented


_NUMPY = {
    **{f"f{dtype.itemsize}": dtype for dtype in (torch.float16, torch.float32, torch.float64)},
    **{f"i{dtype.itemsize}": dtype for dtype in (torch.int8, torch.int16, torch.int32, torch.int64)},
    **{f"u{dtype.itemsize}": dtype for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64)},
    "b1": torch.bool,
}
_LEGACY = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
    # Quantized tensors are not built, but their storages are referred to.
    **{"QInt8": torch.qint8, "QUInt8": torch.quint8, "QInt32": torch.qint32, "QUInt4x2": torch.quint4x2},
    **{"QUInt2x4": torch.quint2x4},
}

#: Values by name.
CONSTANTS: dict[str, Any] = {
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{
        f"{module}.{name}Storage": StorageType(dtype)
        for name, dtype in _LEGACY.items()
        for module in ("torch", "torch.cuda")
    },
    **{f"torch.storage.{name}": StorageType(None) for name in ("UntypedStorage", "_UntypedStorage")},
    "torch.UntypedStorage": StorageType(None),
}

#: Functions and classes by name, and what is done in place of calling them.
BUILDERS: dict[str, Callable[..., Any]] = {
    **{f"torch._utils._rebuild_{name}": _tensor for name in ("tensor", "tensor_v2", "tensor_v3")},
    **{f"torch._utils._rebuild_parameter{more}": _parameter for more in ("", "_with_state")},
    **{f"torch._tensor._rebuild_from_type{more}": _subclass for more in ("", "_v2")},
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _moved,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch.serialization._get_layout": _layout,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _pairs,
    "collections.Counter": _counts,
    "collections.defaultdict": _without_default,
    "builtins.set": _set,
    "builtins.frozenset": _frozenset,
    "builtins.bytes": _no_bytes,
    "builtins.bytearray": _bytearray,
    "builtins.complex": _complex,
    "_codecs.encode": _encoded,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    **dict.fromkeys(("numpy.dtype", "torch.Tensor", "torch.nn.parameter.Parameter"), _nothing),
    **dict.fromkeys(
        (f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool")), _nothing
    ),
}
