"""Whether a compiled module reads torch's tensors as torch does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["misread"]

_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class _Dispatching(Tensor):
    """A tensor of Python's, which kernels must not touch."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


def _samples() -> list[Tensor]:
    """Plain tensors of every dtype that kernels work on, in several layouts, and some that they must refuse."""
    base = torch.arange(60, dtype=torch.float32, device="cpu")
    param = torch.nn.Parameter(base.as_strided((3, 4, 1), (1, 9, 5), 2))
    param.grad = torch.zeros(5, 4, 3, dtype=torch.float32, device="cpu").permute(2, 1, 0)[:, :, 1:2]
    param.detach().add_(1)
    others = [torch.zeros(2, 3, dtype=dtype, device="cpu") for dtype in (*_DTYPES, torch.int64, torch.complex64)]
    scalar = torch.zeros((), dtype=torch.float64, device="cpu")
    empty = torch.zeros(0, 7, dtype=torch.bfloat16, device="cpu")
    negated = torch._neg_view(base[1:])
    return [param, *others, scalar, empty, negated, torch.empty(4, device="meta")]


def _said_by_torch(tensor: Tensor, follow: bool) -> dict[str, object]:
    """What ``probe`` of a compiled module must say of a tensor."""
    subclass, lazy = isinstance(tensor, _Dispatching), tensor.is_neg()
    said: dict[str, object] = {
        "dims": tensor.dim(),
        "numel": tensor.numel(),
        "sizes": tuple(tensor.shape),
        "strides": tensor.stride(),
        "storage_offset": tensor.storage_offset(),
        "contiguous": tensor.is_contiguous(),
        "dtype": _DTYPES.get(tensor.dtype),
        "itemsize": tensor.element_size(),
        "cpu": tensor.device.type == "cpu",
        "plain": tensor.device.type == "cpu" and not subclass and not lazy,
        "subclass": subclass,
        "inference": tensor.is_inference(),
    }
    if follow:
        said |= {
            "data": tensor.data_ptr(),
            "storage_bytes": tensor.untyped_storage().nbytes(),
            "version": tensor._version,
            "grad": None if tensor.grad is None else tensor.grad.data_ptr(),
            "same_object": True,
            "threads": torch.get_num_threads(),
        }
    return said


def misread(module: Any) -> str | None:
    """What a compiled module reads of tensors in another way than torch, or None: see Note [The probe]."""
    # Note [The probe]
    # Most of what a step asks of a tensor is inline in torch's headers, so a module has the layout of torch's objects
    # compiled in. Beside a torch with another layout it would read and write anywhere, without an error. So before it
    # is trusted it says what it reads of a few tensors, and that is compared with what torch says: first what lies in
    # the tensor itself, then what its pointers lead to.
    size = torch._C.TensorBase.__basicsize__
    if size != module.TENSOR_OBJECT_BYTES:
        return f"a tensor object has {module.TENSOR_OBJECT_BYTES} bytes for it and {size} for torch"
    # Whatever mode the import happens in, these are plain tensors.
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
        samples = _samples()
        for follow in (False, True):
            tensors = samples if follow else [*samples, samples[1].as_subclass(_Dispatching)]
            for tensor in tensors:
                if follow and tensor.device.type != "cpu":
                    continue
                said = _said_by_torch(tensor, follow)
                read = module.probe(tensor, follow)
                for what, right in said.items():
                    if read.get(what) != right:
                        return f"{what} of a tensor is {read.get(what)!r} for it and {right!r} for torch"
                if follow and tensor._version != said["version"] + 1:  # type: ignore[operator]
                    return "it does not count up the version of a tensor"
    return None
