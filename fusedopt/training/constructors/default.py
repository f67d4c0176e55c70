"""DefaultOptimWrapperConstructor."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ...messages import check_number, did_you_mean, plain_settings, warn_caller
from ..registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS, accepted_arguments, check_config
from ..unwrapping import named_children, named_parameters, unwrap
from ..wrappers import OptimWrapper

__all__ = ["DefaultOptimWrapperConstructor", "join", "multiply"]

_MULTIPLIERS = ("lr_mult", "decay_mult")

#: Where the constructors are whose `add_params` puts nothing into groups that are in the list already.
_OWN = __name__.rpartition(".")[0]

_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)


def _is_deformable_conv(module: nn.Module) -> bool:
    # By class name, so that mmcv, which defines them, need not be installed.
    names = {cls.__name__ for cls in type(module).__mro__}
    return not names.isdisjoint(("DeformConv2d", "ModulatedDeformConv2d"))


def join(prefix: str, name: str) -> str:
    """The name within the model of ``name`` in the module ``prefix``; the model itself has the prefix ''."""
    return f"{prefix}.{name}" if prefix else name


def multiply(base: Any, factor: Any) -> Any:
    """The product: a float unless one is a tensor."""
    if isinstance(base, Tensor) or isinstance(factor, Tensor):
        return base * factor
    return float(base) * float(factor)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DefaultOptimWrapperConstructor:
    """Builds an optimizer and its wrapper, as ``mmengine.optim.DefaultOptimWrapperConstructor``.

    Without ``paramwise_cfg`` the optimizer gets one group of all parameters. With one, every parameter that is not
    frozen gets its own group, with its name as ``param_name``, and these rules apply:

    - ``custom_keys``, a dict of dicts: the longest key that is part of the parameter's name (ties in alphabetical
      order) switches off the other rules. ``lr_mult`` and ``decay_mult`` multiply; all entries are copied into the
      group.
    - ``bias_lr_mult``: biases, except those of norm layers and of a deformable convolution's offset.
    - ``dcn_offset_lr_mult``: ``conv_offset`` of a deformable convolution.
    - weight decay, by the first of these that is given and applies: ``norm_decay_mult`` (batch, instance, group and
      layer norm), ``bias_decay_mult``, ``dwconv_decay_mult`` (``Conv2d`` with as many groups as input channels, its
      bias too), ``flat_decay_mult`` (1-dim parameters).
    - ``bypass_duplicate``: a shared parameter is added once; without this it is an error.

    Args:
        optim_wrapper_cfg: ``optimizer``, a config of the optimizer; ``type``, the wrapper (``OptimWrapper`` by
            default); and the wrapper's arguments. Not changed.
        paramwise_cfg: the rules above, or None.

    Raises:
        KeyError: no ``optimizer``, or an unknown ``type``.
        TypeError: a config or rule has the wrong type.
        ValueError: an unknown key in ``optim_wrapper_cfg``; a multiplier without the ``lr`` or ``weight_decay`` that
            it multiplies; or a shared parameter.
    """

    #: Keys of paramwise_cfg that multiply the learning rate; a later key overrides an earlier one.
    lr_keys: ClassVar[tuple[str, ...]] = ("bias_lr_mult", "dcn_offset_lr_mult")
    #: Keys of paramwise_cfg that multiply the weight decay, in order of precedence.
    decay_keys: ClassVar[tuple[str, ...]] = (
        "norm_decay_mult",
        "bias_decay_mult",
        "dwconv_decay_mult",
        "flat_decay_mult",
    )
    #: Other keys of paramwise_cfg.
    other_keys: ClassVar[tuple[str, ...]] = ("custom_keys", "bypass_duplicate")
    #: Keys of other constructors, which have no effect with this one.
    ignored_keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None):
        check_config("optim_wrapper", optim_wrapper_cfg)
        if "optimizer" not in optim_wrapper_cfg:
            raise KeyError(
                "optim_wrapper needs the key 'optimizer', as in optimizer=dict(type='AdamW', lr=1e-3); it has "
                f"{', '.join(map(repr, optim_wrapper_cfg)) or 'no keys'}"
            )
        self.optim_wrapper_cfg = dict(plain_settings(optim_wrapper_cfg))
        self.optim_wrapper_cfg.pop("constructor", None)  # a whole config, handed straight to its constructor
        self.optimizer_cfg = self.optim_wrapper_cfg.pop("optimizer")
        check_config("optimizer", self.optimizer_cfg)
        self.optim_wrapper_cfg.setdefault("type", "OptimWrapper")
        self._check_wrapper_keys()
        self.paramwise_cfg = {} if paramwise_cfg is None else plain_settings(paramwise_cfg)
        check_config("paramwise_cfg", self.paramwise_cfg)
        self.base_lr = self.optimizer_cfg.get("lr")
        self.base_wd = self.optimizer_cfg.get("weight_decay")
        self._held: tuple[Any, set[int], int] = None, set(), 0  # see _known_in
        self._validate_cfg()

    def _check_wrapper_keys(self) -> None:
        with OPTIM_WRAPPERS.switch_scope_and_registry(self.optim_wrapper_cfg.get("_scope_")) as registry:
            accepted = accepted_arguments(registry.resolve(self.optim_wrapper_cfg["type"]))
        if "paramwise_cfg" in self.optim_wrapper_cfg:
            raise ValueError("optim_wrapper: 'paramwise_cfg' is for build_optim_wrapper, which takes it out")
        if accepted is None:
            return
        known = {*accepted, "type", "_scope_", "optimizer"}
        for key in self.optim_wrapper_cfg:
            if key not in known:
                hint = did_you_mean(key, {*known, "constructor", "paramwise_cfg"})
                raise ValueError(f"optim_wrapper: unknown key {key!r}; {hint}")

    def _validate_cfg(self) -> None:
        """Check paramwise_cfg: its keys, its values' types, and that the multiplied settings are given."""
        known = (*self.lr_keys, *self.decay_keys, *self.other_keys)
        for key in self.paramwise_cfg:
            if key in self.ignored_keys:
                warn_caller(f"paramwise_cfg: {key!r} has no effect with {type(self).__name__}")
            elif key not in known:
                warn_caller(f"paramwise_cfg: unknown key {key!r} has no effect; {did_you_mean(key, known)}")
        if "custom_keys" in known:
            self._check_custom_keys()
        for key in self.lr_keys:
            self._check_multiplier(f"paramwise_cfg {key}", self.paramwise_cfg.get(key), "lr", self.base_lr)
        for key in self.decay_keys:
            # As in MMEngine, this key alone does nothing without weight decay.
            base = 0.0 if key == "flat_decay_mult" and self.base_wd is None else self.base_wd
            self._check_multiplier(f"paramwise_cfg {key}", self.paramwise_cfg.get(key), "weight_decay", base)
        bypass = self.paramwise_cfg.get("bypass_duplicate", False)
        if not isinstance(bypass, bool):
            raise TypeError(f"paramwise_cfg bypass_duplicate must be True or False, got {bypass!r}")

    def _check_custom_keys(self) -> None:
        custom_keys = self.paramwise_cfg.get("custom_keys", {})
        check_config("paramwise_cfg['custom_keys']", custom_keys)
        for key, entry in custom_keys.items():
            if not isinstance(key, str):
                raise TypeError(f"paramwise_cfg['custom_keys']: keys must be parts of parameter names, got {key!r}")
            name = f"paramwise_cfg['custom_keys'][{key!r}]"
            check_config(name, entry)
            self._check_multiplier(f"{name} lr_mult", entry.get("lr_mult"), "lr", self.base_lr)
            self._check_multiplier(f"{name} decay_mult", entry.get("decay_mult"), "weight_decay", self.base_wd)
            for setting in entry:
                # A group may have any setting, but these two are easily mistyped.
                close = difflib.get_close_matches(str(setting), _MULTIPLIERS, 1, cutoff=0.8)
                if close and setting not in _MULTIPLIERS:
                    warn_caller(
                        f"{name}: {setting!r} multiplies nothing, it is only copied into the group; did you mean "
                        f"{close[0]!r}?"
                    )

    def _check_multiplier(self, name: str, value: Any, multiplied: str, base: Any) -> None:
        if value is None:
            return
        check_number(name, value)
        if base is None:
            raise ValueError(f"{name} multiplies {multiplied}, which the optimizer config must then give explicitly")
        check_number(f"optimizer {multiplied}", base)

    def _is_in(self, param_group: Mapping[str, Any], param_group_list: list[dict[str, Any]]) -> bool:
        """Whether a parameter of the group is in a group of the list."""
        known = self._known_in(param_group_list)
        return not known.isdisjoint(map(id, param_group["params"]))

    def _known_in(self, groups: list[dict[str, Any]]) -> set[int]:
        """The ids of the parameters in the groups. Those of the list of the last call are kept, and new groups added.

        A subclass with its own ``add_params`` may put parameters into groups that it has made before: then all are
        looked at in each call.
        """
        held, known, count = self._held
        if held is not groups or len(groups) < count or not type(self).add_params.__module__.startswith(_OWN):
            known, count = set(), 0
        known.update(id(param) for group in groups[count:] for param in group["params"])
        self._held = groups, known, len(groups)
        return known

    def add_params(
        self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", is_dcn_module: bool | None = None
    ) -> None:
        """Append a group for each parameter of ``module`` to ``params``.

        It calls itself for each child, so a subclass may handle some modules itself and leave the rest to this.

        Args:
            params: the groups.
            module: the module, with its children.
            prefix: its name within the model.
            is_dcn_module: whether it is a child of a deformable convolution.
        """
        in_dcn = bool(is_dcn_module)
        self._add_own_params(
            params, module, prefix, lambda name, param: self._settings(prefix, name, param, module, in_dcn)
        )
        is_dcn = _is_deformable_conv(module)
        for name, child in named_children(module):
            self.add_params(params, child, prefix=join(prefix, name), is_dcn_module=is_dcn)

    def _add_own_params(
        self,
        params: list[dict[str, Any]],
        module: nn.Module,
        prefix: str,
        settings: Callable[[str, nn.Parameter], dict[str, Any]],
    ) -> None:
        """Append a group for each parameter of ``module`` itself: its name, and ``settings(name, param)``."""
        for name, param in module.named_parameters(recurse=False):
            if not param.requires_grad:
                continue
            group = {"params": [param], "param_name": join(prefix, name)}
            if self._is_in(group, params):
                if self.paramwise_cfg.get("bypass_duplicate", False):
                    continue
                other = next(group for group in params if any(each is param for each in group["params"]))
                raise ValueError(
                    f"parameter {group['param_name']!r} is shared: it is also {other.get('param_name', 'in a group')!r}"
                    "; paramwise_cfg=dict(bypass_duplicate=True) keeps the first"
                )
            params.append({**group, **settings(name, param)})

    def _match_name(self, module_name: str, name: str) -> str:
        """The name in which custom keys are searched."""
        # With a leading dot at the root too, as in MMEngine: the key '.weight' matches any weight.
        return f"{module_name}.{name}"

    def _settings(
        self, module_name: str, name: str, param: nn.Parameter, owner: nn.Module, in_dcn: bool
    ) -> dict[str, Any]:
        """The settings of the group of one parameter."""
        cfg = self.paramwise_cfg
        custom_keys = cfg.get("custom_keys", {})
        settings: dict[str, Any] = {}
        for key in sorted(custom_keys, key=lambda key: (-len(key), key)):
            if key in self._match_name(module_name, name):
                entry = custom_keys[key]
                if entry.get("lr_mult") is not None:
                    settings["lr"] = multiply(self.base_lr, entry["lr_mult"])
                if entry.get("decay_mult") is not None:
                    settings["weight_decay"] = multiply(self.base_wd, entry["decay_mult"])
                return {**settings, **entry}

        is_norm = isinstance(owner, _NORMS)
        lr_applies = {
            "bias_lr_mult": name == "bias" and not is_norm and not in_dcn,
            "dcn_offset_lr_mult": in_dcn and "conv_offset" in module_name and isinstance(owner, nn.Conv2d),
        }
        for key in self.lr_keys:
            if lr_applies[key] and cfg.get(key) is not None:
                settings["lr"] = multiply(self.base_lr, cfg[key])
        decay_applies = {
            "norm_decay_mult": is_norm,
            "bias_decay_mult": name == "bias" and not in_dcn,
            "dwconv_decay_mult": isinstance(owner, nn.Conv2d) and owner.in_channels == owner.groups,
            "flat_decay_mult": param.ndim == 1 and not in_dcn,
        }
        for key in self.decay_keys:
            if decay_applies[key] and cfg.get(key) is not None and self.base_wd is not None:
                settings["weight_decay"] = multiply(self.base_wd, cfg[key])
                break
        return settings

    def _warn_of_unmatched_keys(self, model: nn.Module) -> None:
        paths = (name.rpartition(".") for name, _ in named_parameters(model, remove_duplicate=False))
        names = [self._match_name(module_name, name) for module_name, _, name in paths]
        for key in self.paramwise_cfg.get("custom_keys", {}):
            if not any(key in name for name in names):
                warn_caller(f"paramwise_cfg['custom_keys']: {key!r} matches no parameter name and has no effect")

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer of ``model`` and its wrapper."""
        model = unwrap(model, by_structure=True)
        params: Any = model.parameters()
        if self.paramwise_cfg:
            params = []
            self.add_params(params, model)
            self._held = None, set(), 0
            if "custom_keys" in self.other_keys:
                self._warn_of_unmatched_keys(model)
        return self.build_wrapper(params)

    def build_wrapper(self, params: Any) -> OptimWrapper:
        """Build the optimizer of these parameters or groups, and its wrapper."""
        # By position: some optimizers name their first argument differently.
        optimizer = OPTIMIZERS.build(self.optimizer_cfg, params)
        return OPTIM_WRAPPERS.build(self.optim_wrapper_cfg, optimizer=optimizer)
