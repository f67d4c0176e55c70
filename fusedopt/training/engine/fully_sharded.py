"""``model_wrapper_cfg=dict(type='fully_shard')``: torch's FSDP2, which shards a model over the processes of a run."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...messages import check_flag, check_whole_number, did_you_mean, parse_dtype, plain, some
from ...undo import unchanged_on_error
from ..registry import MODEL_WRAPPERS
from ..sharding import has_shards
from ..unwrapping import named_children, named_modules, named_parameters
from .distributed import world_size

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "check_fully_shard",
    "fully_shard",
    "is_fsdp1",
    "is_fully_shard",
    "is_fully_sharded",
    "refuse_fsdp1",
    "refuse_other_shards",
    "unsharded_on_error",
]

_POLICY_KEYS = ("param_dtype", "reduce_dtype", "output_dtype", "cast_forward_inputs")
_MESH_KEYS = ("mesh_shape", "mesh_dim_names")
_AXES = {1: ("shard",), 2: ("replicate", "shard")}
#: Modules without a forward pass, before which fully_shard could gather their parameters.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
#: Modules that use the parameters of their children without calling these, so that nothing would gather them.
_WHOLE = (nn.MultiheadAttention,)


@MODEL_WRAPPERS.register_module(name="fully_shard")
def fully_shard(
    module: nn.Module,
    modules: str | type | Sequence[str | type] = (),
    min_num_params: int | None = None,
    mp_policy: Mapping[str, Any] | None = None,
    reshard_after_forward: bool | int | None = None,
    mesh: Mapping[str, Any] | DeviceMesh | None = None,
    cpu_offload: bool = False,
) -> nn.Module:
    """Shard a model in place with ``torch.distributed.fsdp.fully_shard``, and return it.

    Parameters become DTensors under their former names. All processes get the first one's parameters and buffers
    before, as with DistributedDataParallel. Each of the modules chosen by ``modules`` or ``min_num_params`` is gathered
    by itself for its forward and backward pass; the rest of the model is gathered together.

    Args:
        module: the model.
        modules: classes, by name (``'Block'``), import path or as objects, where a base class also counts; or names of
            modules, where ``*`` stands for any characters but dots (``'backbone.layers.*'``). Modules inside a
            ``MultiheadAttention``, which does not call them, do not count.
        min_num_params: also choose, from the inside out, each module with at least this number of parameters that
            are not in a module chosen before; MMEngine's and torch's size-based policy.
        mp_policy: ``dict(param_dtype='bfloat16', reduce_dtype='float32', output_dtype=None,
            cast_forward_inputs=True)``, dtypes by name or as objects, or torch's ``MixedPrecisionPolicy``.
        reshard_after_forward: whether a module's gathered parameters are freed until the backward pass, or the
            number of processes over which they stay sharded; by default True, but False for the whole model.
        mesh: ``dict(mesh_shape=(replicas, shards), mesh_dim_names=('replicate', 'shard'))`` to shard within groups
            of processes and replicate over these, or a ``DeviceMesh``; by default all processes share one copy.
        cpu_offload: keep the parameters, their gradients and the optimizer's state on the CPU.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an unknown key, a name that matches no module, a mesh that does not fit the processes, a parameter
            that cannot be sharded, or one that modules to be gathered separately share. Nothing has changed then.
        RuntimeError: there is no process group.
    """
    chosen = _chosen(module, modules, min_num_params)
    settings = _settings(mp_policy, reshard_after_forward, cpu_offload)
    _check_parameters(module, chosen)
    mesh_shape = _check_mesh(mesh)
    if not dist.is_initialized():
        raise RuntimeError("fully_shard needs a process group: start the training with torchrun and launcher='pytorch'")
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    if mesh is None or isinstance(mesh, Mapping):
        names = tuple((mesh or {}).get("mesh_dim_names", _AXES[len(mesh_shape)]))
        settings["mesh"] = init_device_mesh(next(module.parameters()).device.type, mesh_shape, mesh_dim_names=names)
    else:
        settings["mesh"] = mesh
    with unsharded_on_error(module):
        _broadcast(module)
        for _, part in reversed(chosen):  # the inner ones first
            fsdp.fully_shard(part, **settings)
        fsdp.fully_shard(module, **settings)
        module.register_forward_hook(_reshard_after_evaluation)
    return module


def check_fully_shard(module: nn.Module, cfg: Mapping[str, Any]) -> None:
    """Raise the errors of :func:`fully_shard` that do not depend on the number of processes."""
    settings = {key: value for key, value in cfg.items() if key not in ("type", "_scope_")}
    known = ("modules", "min_num_params", "mp_policy", "reshard_after_forward", "mesh", "cpu_offload")
    for key in settings:
        if key not in known:
            raise TypeError(f"fully_shard has no argument {key!r}; {did_you_mean(key, known)}")
    _check_parameters(module, _chosen(module, settings.get("modules", ()), settings.get("min_num_params")))
    _settings(settings.get("mp_policy"), settings.get("reshard_after_forward"), settings.get("cpu_offload", False))


def is_fully_shard(target: Any) -> bool:
    """Whether the ``type`` of a model wrapper is :func:`fully_shard`, ours or torch's."""
    is_torchs = getattr(target, "__name__", "") == "fully_shard" and target.__module__.partition(".")[0] == "torch"
    return target is fully_shard or is_torchs


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether a parameter of ``model`` is a DTensor: of fully_shard, or of tensor parallelism."""
    return has_shards(model.parameters())


def refuse_other_shards(model: nn.Module) -> None:
    """Raise ValueError if a model has DTensors that are not of :func:`fully_shard`."""
    ours = _reshard_after_evaluation in model._forward_hooks.values()
    if world_size() > 1 and is_fully_sharded(model) and not ours:
        raise ValueError(
            f"{type(model).__name__} is sharded already. A Runner divides the data over all processes, which would be "
            "wrong with tensor parallelism; give the model unsharded, with "
            "model_wrapper_cfg=dict(type='fully_shard')"
        )


def is_fsdp1(kind: Any) -> bool:
    """Whether ``kind`` is torch's FullyShardedDataParallel or derives from it, or is what its name stands for here."""
    return kind is refuse_fsdp1 or any(
        each.__name__ == "FullyShardedDataParallel" and each.__module__.partition(".")[0] == "torch"
        for each in getattr(kind, "__mro__", ())
    )


def refuse_fsdp1(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise a NotImplementedError: a Runner does not train FullyShardedDataParallel."""
    raise NotImplementedError(
        "a Runner does not train torch's FullyShardedDataParallel (FSDP1): its checkpoints would hold shards without "
        "saying how they are cut; use model_wrapper_cfg=dict(type='fully_shard'), which is FSDP2"
    )


for _name in ("MMFullyShardedDataParallel", "FullyShardedDataParallel"):
    MODEL_WRAPPERS.register_module(name=_name, module=refuse_fsdp1)


def _chosen(module: nn.Module, modules: Any, min_num_params: int | None) -> list[tuple[str, nn.Module]]:
    """The modules to be gathered by themselves, with their names, the outer ones first; without the model itself."""
    entries = [modules] if isinstance(modules, str | type) else modules
    if not isinstance(entries, list | tuple) or not all(isinstance(each, str | type) for each in entries):
        raise TypeError(f"modules must be a list of classes, or of names of classes or modules, got {modules!r}")
    (_, top), *inner = named_modules(module)
    closed = tuple(f"{name}." for name, part in inner if isinstance(part, _WHOLE))
    inner = [(name, part) for name, part in inner if not name.startswith(closed)]
    matched: set[nn.Module] = set()
    for entry in entries:
        found = [(name, part) for name, part in inner if _matches(entry, name, part)]
        containers = [name for name, part in found if isinstance(part, _CONTAINERS)]
        if containers:
            raise ValueError(
                f"modules={entry!r} matches {containers[0]!r}, a {type(dict(found)[containers[0]]).__name__}, which "
                f"has no forward pass of its own; name the modules in it, as with '{containers[0]}.*'"
            )
        filled = {part for _, part in found if next(part.parameters(), None) is not None}
        if not filled and not _matches(entry, "", top):
            raise ValueError(f"modules={entry!r} matches {_no_match(entry, found, inner)}")
        matched |= filled
    if min_num_params is not None:
        _choose_by_size(top, check_whole_number("min_num_params", min_num_params, 1), matched)
    return [(name, part) for name, part in inner if part in matched]


def _matches(entry: str | type, name: str, part: nn.Module) -> bool:
    if isinstance(entry, type):
        return isinstance(part, entry)
    classes = [each for each in type(part).__mro__ if issubclass(each, nn.Module) and each is not nn.Module]
    if any(entry in (each.__name__, f"{each.__module__}.{each.__qualname__}") for each in classes):
        return True
    return re.fullmatch(re.escape(entry).replace(r"\*", "[^.]*"), name) is not None


def _no_match(entry: str | type, found: Sequence[Any], inner: Sequence[tuple[str, nn.Module]]) -> str:
    if found:
        return f"only modules without parameters: {some([name for name, _ in found])}"
    known = {name for name, _ in inner} | {type(part).__name__ for _, part in inner}
    return f"no module of the model; {did_you_mean(str(entry), known)}"


def _choose_by_size(module: nn.Module, least: int, chosen: set[nn.Module]) -> set[Tensor]:
    """Add the large modules below ``module`` to ``chosen``; return the parameters that are in none of them."""
    left: set[Tensor] = {param for param in module._parameters.values() if param is not None}
    if isinstance(module, _WHOLE):
        left.update(module.parameters())
    else:
        for _, child in named_children(module):
            left |= _choose_by_size(child, least, chosen)
    if module not in chosen and not isinstance(module, _CONTAINERS) and sum(each.numel() for each in left) >= least:
        chosen.add(module)
    return set() if module in chosen else left


def _check_parameters(module: nn.Module, chosen: Sequence[tuple[str, nn.Module]]) -> None:
    """Raise ValueError for parameters that cannot be sharded so."""
    if next(module.parameters(), None) is None:
        raise ValueError(f"{type(module).__name__} has no parameters to shard")
    if is_fully_sharded(module):
        raise ValueError(f"{type(module).__name__} is sharded already; omit model_wrapper_cfg")
    names = {name for name, _ in chosen}
    first: dict[Tensor, tuple[str, str]] = {}
    for name, param in named_parameters(module, remove_duplicate=False):
        if nn.parameter.is_lazy(param):
            raise ValueError(f"parameter {name!r} has no shape yet: run the model once before it is sharded")
        if not param.dim():
            raise ValueError(f"parameter {name!r} has no dimension to shard; expected shape (1,) instead of ()")
        parts = name.split(".")[:-1]
        paths = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        group = next((path for path in paths if path in names), "")
        other, others_group = first.setdefault(param, (name, group))
        if others_group != group:
            raise ValueError(
                f"{other!r} and {name!r} are one parameter, but would be gathered separately, with "
                f"{others_group or 'the whole model'!r} and {group or 'the whole model'!r}; choose modules so that "
                "both are in the same"
            )


def _settings(mp_policy: Any, reshard_after_forward: Any, cpu_offload: Any) -> dict[str, Any]:
    """The arguments of torch's ``fully_shard``, without the mesh."""
    from torch.distributed import fsdp

    if isinstance(mp_policy, Mapping):
        for key in mp_policy:
            if key not in _POLICY_KEYS:
                raise ValueError(f"mp_policy has the unknown key {key!r}; {did_you_mean(str(key), _POLICY_KEYS)}")
        policy = {key: parse_dtype(value) for key, value in mp_policy.items() if key != "cast_forward_inputs"}
        casts = check_flag("mp_policy.cast_forward_inputs", mp_policy.get("cast_forward_inputs", True))
        mp_policy = fsdp.MixedPrecisionPolicy(**policy, cast_forward_inputs=casts)
    elif not isinstance(mp_policy, fsdp.MixedPrecisionPolicy | None):
        raise TypeError(f"mp_policy must be a dict, a MixedPrecisionPolicy or None, got {mp_policy!r}")
    reshard = plain(reshard_after_forward)
    if not isinstance(reshard, bool | int | None):
        raise TypeError(f"reshard_after_forward must be True, False, an int or None, got {reshard_after_forward!r}")
    offloads = check_flag("cpu_offload", cpu_offload)
    return {
        "mp_policy": mp_policy or fsdp.MixedPrecisionPolicy(),
        "reshard_after_forward": reshard,
        "offload_policy": fsdp.CPUOffloadPolicy(torch.cuda.is_available()) if offloads else fsdp.OffloadPolicy(),
    }


def _check_mesh(mesh: Any) -> tuple[int, ...]:
    """The shape of the mesh; ValueError unless it fits the processes."""
    count = world_size()
    if mesh is None:
        return (count,)
    if isinstance(mesh, Mapping):
        for key in mesh:
            if key not in _MESH_KEYS:
                raise ValueError(f"mesh has the unknown key {key!r}; {did_you_mean(str(key), _MESH_KEYS)}")
        given = plain(mesh.get("mesh_shape", (count,)))
        if not isinstance(given, list | tuple) or len(given) not in _AXES:
            raise ValueError(f"mesh.mesh_shape must be (shards,) or (replicas, shards), got {given!r}")
        shape = tuple(check_whole_number("mesh.mesh_shape", size, 1) for size in given)
        names = mesh.get("mesh_dim_names", _AXES[len(shape)])
        if not isinstance(names, list | tuple) or len(names) != len(shape) or len(set(names)) != len(names):
            raise ValueError(f"mesh.mesh_dim_names must be {len(shape)} different names, got {names!r}")
    else:
        from torch.distributed.device_mesh import DeviceMesh

        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh must be a dict, a DeviceMesh or None, got {mesh!r}")
        shape = tuple(mesh.shape)
    if math.prod(shape) != count:
        raise ValueError(
            f"a mesh of shape {shape} needs {math.prod(shape)} processes, but there are {count}; torchrun's "
            "--nproc-per-node and --nnodes set their number"
        )
    return shape


@torch.no_grad()
def _broadcast(module: nn.Module) -> None:
    """Give all processes the parameters and buffers of the first one."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            value = tensor.detach().contiguous()
            dist.broadcast(value, 0)
            if value.data_ptr() != tensor.data_ptr():
                tensor.copy_(value)


def _reshard_after_evaluation(module: nn.Module, args: Any, output: Any) -> None:
    """Free what a forward pass without gradients has gathered.

    No backward pass frees it then, so the model would keep these parameters, and use them in the next forward pass,
    although other weights may have been loaded meanwhile, as by an EMAHook.
    """
    if not torch.is_grad_enabled():
        from torch.distributed.fsdp import FSDPModule

        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


@contextlib.contextmanager
def unsharded_on_error(*modules: nn.Module) -> Iterator[None]:
    """A context in which an error makes ``modules`` what they were, if they were sharded inside."""
    before = [(part, type(part)) for module in modules for part in module.modules()]
    try:
        with unchanged_on_error(*modules):
            yield
    except BaseException:
        from torch.distributed._composable_state import _module_state_mapping

        for part, kind in before:
            if type(part) is not kind:
                part.__class__ = kind
                _module_state_mapping.pop(part, None)
        raise
