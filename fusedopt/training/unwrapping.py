"""The model inside torch's wrappers: torch.compile, DistributedDataParallel, DataParallel, FSDP.

Note [Unwrapping]: parameter names select learning rates, pair a model with its average, and are the keys of a
checkpoint, but wrappers of a model or its parts add to these names. So all code that uses names looks at the model, and
its parts, without wrappers: names from a wrapped model then match those of a bare one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from copy import copy, deepcopy
from typing import Any

from torch import Tensor, nn

from ..messages.wrapping import HELD_AS, bare_name, barest_name
from .registry import MODEL_WRAPPERS

__all__ = [
    "bare_copy",
    "bare_state_dict",
    "fitted_state_dict",
    "holders",
    "named_children",
    "named_modules",
    "named_parameters",
    "stateful",
    "tensors_copy",
    "unwrap",
]


def _held(module: nn.Module) -> nn.Module | None:
    """The module that ``module`` wraps, or None."""
    for cls in type(module).__mro__:
        name = HELD_AS.get(cls.__name__) if cls.__module__.partition(".")[0] == "torch" else None
        name = "module" if name is None and cls in MODEL_WRAPPERS.module_dict.values() else name
        if name is not None and module._modules.get(name) is not None:
            return module._modules[name]
    return None


def holders(model: nn.Module, by_structure: bool = False) -> Iterator[nn.Module]:
    """``model`` and the modules that it wraps, from the outside in; the last is the model itself.

    Args:
        model: the model, in any number of wrappers.
        by_structure: whether any module with only a child ``module`` counts as a wrapper. Use this only for names,
            since such a module may do more than call its child.
    """
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        held = _held(inner)
        if held is None and by_structure and list(inner._modules) == ["module"] and not any(inner._parameters.values()):
            held = inner._modules["module"]
        inner = held


def unwrap(model: nn.Module, by_structure: bool = False) -> nn.Module:
    """The model itself; see :func:`holders`, and Note [Unwrapping]."""
    *_, innermost = holders(model, by_structure)
    return innermost


def named_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children, unwrapped, with their names; a child with several names comes once."""
    seen = set()
    for name, child in module._modules.items():
        if child is not None and (bare := unwrap(child)) not in seen:
            seen.add(bare)
            yield name, bare


def named_modules(
    model: nn.Module, prefix: str = "", remove_duplicate: bool = True, seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """As ``model.named_modules()``, without wrappers around the model or its parts."""
    seen = set() if seen is None else seen
    model = unwrap(model)
    if model in seen:
        return
    if remove_duplicate:
        seen.add(model)
    yield prefix, model
    for name, child in model._modules.items():
        if child is not None:
            yield from named_modules(child, f"{prefix}.{name}" if prefix else name, remove_duplicate, seen)


def named_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """As ``model.named_parameters()``, without wrappers around the model or its parts."""
    seen = set()
    for path, module in named_modules(model, remove_duplicate=remove_duplicate):
        for name, param in module._parameters.items():
            if param is not None and param not in seen:
                if remove_duplicate:
                    seen.add(param)
                yield f"{path}.{name}" if path else name, param


def bare_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the model without wrappers around it or its parts."""
    copied = deepcopy(unwrap(model))
    for module in list(copied.modules()):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = unwrap(child)
    return copied


class _Tensors(nn.Module):
    """Parameters and buffers without the model that they are from."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "a copy of a sharded model holds only its shards and cannot be called; to evaluate with an average, call "
            "the model itself inside `with average.applied_to(model):`"
        )


def tensors_copy(model: nn.Module) -> nn.Module:
    """Modules that hold copies of the model's parameters, buffers and children under the same names, and no more.

    For models that cannot be copied, such as those of ``fully_shard``.
    """
    modules: dict[nn.Module, nn.Module] = {}
    tensors: dict[Tensor, Tensor] = {}

    def copied(module: nn.Module) -> nn.Module:
        module = unwrap(module)
        if module in modules:
            return modules[module]
        held: Any = _Tensors()
        modules[module] = held
        held._version = module._version
        held._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        for name, param in module._parameters.items():
            if param is not None and param not in tensors:
                tensors[param] = nn.Parameter(param.detach().clone(), param.requires_grad)
            held._parameters[name] = None if param is None else tensors[param]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer not in tensors:
                tensors[buffer] = buffer.detach().clone()
            held._buffers[name] = None if buffer is None else tensors[buffer]
        for name, child in module._modules.items():
            held._modules[name] = None if child is None else copied(child)
        return held

    return copied(model)


def stateful(model: nn.Module) -> nn.Module:
    """The module to call ``state_dict`` and ``load_state_dict`` of: the model, or FSDP, which gathers shards."""
    *around, bare = holders(model)
    return next((each for each in around if "_fsdp_wrapped_module" in each._modules), bare)


def bare_state_dict(model: nn.Module) -> OrderedDict[str, Any]:
    """The state dict of the model, with the names that it has without wrappers."""
    state: Any = stateful(model).state_dict()
    inside = [part for _, each in named_modules(model) for part in each._modules.values() if part is not None]
    return fitted_state_dict(state, _names_within(model)) if any(_held(part) is not None for part in inside) else state


def _names_within(model: nn.Module) -> set[str]:
    """Names of parameters and buffers, without wrappers of the model's parts."""
    return {
        f"{path}.{name}" if path else name
        for path, module in named_modules(model, remove_duplicate=False)
        for name in (*module._parameters, *module._buffers)
    }


def fitted_state_dict(state_dict: Mapping[str, Any], own: Iterable[str]) -> OrderedDict[str, Any]:
    """``state_dict`` with the names of ``own``, however either model was wrapped.

    Entries that ``own`` does not have in any wrapping, and ambiguous ones, keep their names.

    Args:
        state_dict: the state dict of a model, parts of which may have been wrapped; its versions are kept.
        own: the wanted names, such as the keys of a state dict.
    """
    own = list(own)
    exactly = {bare_name(name): name for name in own}
    loosely: dict[str, list[str]] = {}
    for name in own:
        loosely.setdefault(barest_name(name), []).append(name)
    names = {name: exactly.get(bare_name(str(name))) for name in state_dict}
    taken = set(names.values())
    for name in [name for name, found in names.items() if found is None]:
        candidates = loosely.get(barest_name(str(name)), [])
        names[name] = candidates[0] if len(candidates) == 1 and candidates[0] not in taken else name
        taken.add(names[name])
    fitted: Any = OrderedDict((names[name], value) for name, value in state_dict.items())
    versions = getattr(state_dict, "_metadata", None)
    if versions is not None:
        fitted._metadata = copy(versions)
        for name, version in versions.items():
            fitted._metadata.setdefault(barest_name(name), version)
    return fitted
