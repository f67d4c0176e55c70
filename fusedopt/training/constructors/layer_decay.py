"""Constructors whose learning rate decays from the head of a model to its stem, in two dialects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ...messages import check_number
from ..registry import OPTIM_WRAPPER_CONSTRUCTORS
from ..unwrapping import named_children, named_parameters, unwrap
from .default import DefaultOptimWrapperConstructor, join, multiply
from .depth import DepthFunction, family_of_segmentation, layer_depth, own_depth, stage_depth

__all__ = [
    "LayerDecayOptimizerConstructor",
    "LearningRateDecayOptimWrapperConstructor",
    "LearningRateDecayOptimizerConstructor",
]


def _backbone_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The model's ``backbone``, or the model itself, and the prefix of its parameters' names."""
    model = unwrap(model)
    backbone = getattr(model, "backbone", None)
    return (unwrap(backbone), "backbone.") if isinstance(backbone, nn.Module) else (model, "")


class _LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Base of both dialects: the learning rate must be given, and has no other multipliers."""

    lr_keys: ClassVar[tuple[str, ...]] = ()
    ignored_keys: ClassVar[tuple[str, ...]] = ("bias_lr_mult", "dcn_offset_lr_mult", "dwconv_decay_mult")
    #: The key of paramwise_cfg with the factor on the learning rate per layer.
    rate_key: ClassVar[str]

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        if self.paramwise_cfg:
            self._check_multiplier(f"paramwise_cfg {self.rate_key}", self._decay_rate, "lr", self.base_lr)
            check_number(f"paramwise_cfg {self.rate_key}", self._decay_rate, exclusive=True)

    @property
    def _decay_rate(self) -> Any:
        return self.paramwise_cfg.get(self.rate_key, 1.0)

    def _scaled(self, depth: tuple[int, int]) -> dict[str, Any]:
        layer_id, depths = depth
        scale = multiply(1.0, self._decay_rate) ** (depths - layer_id - 1)
        return {"lr": multiply(self.base_lr, scale), "lr_scale": scale}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(replaceable=True)
class LearningRateDecayOptimWrapperConstructor(_LayerDecayConstructor):
    """Layer-wise learning rate decay in MMPretrain's dialect.

    With ``paramwise_cfg=dict(layer_decay_rate=…, …)`` every parameter gets its own group with the learning rate
    ``lr * layer_decay_rate ** (depths - layer_id - 1)`` and the entries ``lr_scale``, ``layer_id`` and ``param_name``.
    Depths come from the model's ``get_layer_depth(name) -> (layer_id, depths)`` or its backbone's
    ``get_layer_depth(name, prefix)``, else from the rules for ViT, BEiT, MAE, ConvNeXt and Swin, chosen by the name of
    the backbone's class.

    ``custom_keys``, ``norm_decay_mult``, ``bias_decay_mult``, ``flat_decay_mult`` and ``bypass_duplicate`` work as in
    :class:`DefaultOptimWrapperConstructor`, except that the ``lr_mult`` of a custom key is copied but has no effect,
    and that keys match names without a leading dot. ``bias_lr_mult``, ``dwconv_decay_mult`` and ``dcn_offset_lr_mult``
    have no effect.

    Args:
        optim_wrapper_cfg: see :class:`DefaultOptimWrapperConstructor`.
        paramwise_cfg: the above.

    Raises:
        ValueError: the optimizer config gives no ``lr``; else see :class:`DefaultOptimWrapperConstructor`.
        NotImplementedError: when called with a model whose depths are not known.
    """

    rate_key: ClassVar[str] = "layer_decay_rate"
    decay_keys: ClassVar[tuple[str, ...]] = ("norm_decay_mult", "bias_decay_mult", "flat_decay_mult")
    other_keys: ClassVar[tuple[str, ...]] = ("custom_keys", "bypass_duplicate", "layer_decay_rate")

    def add_params(
        self,
        params: list[dict[str, Any]],
        module: nn.Module,
        prefix: str = "",
        is_dcn_module: bool | None = None,
        get_layer_depth: DepthFunction | None = None,
    ) -> None:
        """Append a group for each parameter of ``module`` to ``params``; it calls itself for each child.

        Args:
            params: the groups.
            module: the module, with its children.
            prefix: its name within the model.
            is_dcn_module: has no effect.
            get_layer_depth: maps a parameter's name to its depth; by default as described above.
        """
        depth_of = get_layer_depth or own_depth(module) or layer_depth(*_backbone_of(module))

        def settings(name: str, param: nn.Parameter) -> dict[str, Any]:
            own = self._settings(prefix, name, param, module, False)
            own.pop("decay_mult", None)
            depth = depth_of(join(prefix, name))
            return {**own, **self._scaled(depth), "layer_id": depth[0]}

        self._add_own_params(params, module, prefix, settings)
        for name, child in named_children(module):
            self.add_params(params, child, prefix=join(prefix, name), get_layer_depth=depth_of)

    def _match_name(self, module_name: str, name: str) -> str:
        return join(module_name, name)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(replaceable=True)
class LearningRateDecayOptimizerConstructor(_LayerDecayConstructor):
    """Layer- or stage-wise learning rate decay in MMSegmentation's dialect.

    With ``paramwise_cfg=dict(num_layers=…, decay_rate=…, decay_type='layer_wise')`` (``num_layers`` is the backbone's
    by default), parameters of the same depth share a group: ``layer_{id}_decay``; or ``layer_{id}_no_decay``, with a
    weight decay of 0, for biases, 1-dim parameters, and a ``pos_embed`` and ``cls_token`` at the root of the model
    (``backbone.pos_embed`` decays, as in MMSegmentation). The learning rate is
    ``lr * decay_rate ** (depths - id - 1)``, with ``num_layers + 2`` depths. Groups have the entries ``param_names``,
    ``lr_scale`` and ``group_name``.

    The rule depends on the backbone's class: ``'layer_wise'`` knows ViT, BEiT, MAE, ConvNeXt and Swin (whose layers are
    always counted), ``'stage_wise'`` knows ConvNeXt; as in MMSegmentation, a class name that contains BEiT, MAE or
    ConvNeXt is enough. For other backbones both use the model's own ``get_layer_depth``, including its number of
    depths.

    Args:
        optim_wrapper_cfg: see :class:`DefaultOptimWrapperConstructor`.
        paramwise_cfg: the above.

    Raises:
        KeyError: no ``decay_rate``.
        ValueError: no ``lr``, an unknown ``decay_type``, or a value out of range.
        TypeError: ``num_layers`` is not an int.
        NotImplementedError: when called with a model whose depths are not known.
    """

    rate_key: ClassVar[str] = "decay_rate"
    decay_keys: ClassVar[tuple[str, ...]] = ()
    other_keys: ClassVar[tuple[str, ...]] = ("num_layers", "decay_rate", "decay_type")
    ignored_keys: ClassVar[tuple[str, ...]] = (
        *_LayerDecayConstructor.ignored_keys,
        "custom_keys",
        "bypass_duplicate",
        "norm_decay_mult",
        "bias_decay_mult",
        "flat_decay_mult",
    )

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        if not self.paramwise_cfg:
            return
        decay_type = self.paramwise_cfg.get("decay_type", "layer_wise")
        # MMSegmentation takes any type that contains 'layer_wise'; 'layer_wise_vit' is in old configs.
        if not isinstance(decay_type, str) or ("layer_wise" not in decay_type and decay_type != "stage_wise"):
            raise ValueError(f"paramwise_cfg decay_type must be 'layer_wise' or 'stage_wise', got {decay_type!r}")
        num_layers = self.paramwise_cfg.get("num_layers")
        if num_layers is not None:
            if isinstance(num_layers, bool) or not isinstance(num_layers, int):
                raise TypeError(f"paramwise_cfg num_layers must be an int, got {num_layers!r}")
            check_number("paramwise_cfg num_layers", num_layers, minimum=1)
        if self.rate_key not in self.paramwise_cfg:
            has = ", ".join(map(repr, self.paramwise_cfg))
            raise KeyError(f"paramwise_cfg needs the key {self.rate_key!r}, the factor per layer; it has {has}")

    def _depth_function(self, model: nn.Module) -> DepthFunction:
        backbone, prefix = _backbone_of(model)
        by_stages = self.paramwise_cfg.get("decay_type") == "stage_wise"
        rule = stage_depth if by_stages else layer_depth
        try:
            return rule(backbone, prefix, self.paramwise_cfg.get("num_layers"), family_of_segmentation(backbone))
        except NotImplementedError:
            own = own_depth(model)
            if own is None:
                raise
            return own

    def add_params(
        self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", is_dcn_module: bool | None = None
    ) -> None:
        """Append a group for each depth of ``module`` and kind of decay to ``params``; subclasses may replace this."""
        depth_of = self._depth_function(module)
        groups: dict[str, dict[str, Any]] = {}
        for name, param in named_parameters(module):
            if not param.requires_grad:
                continue
            decays = param.ndim != 1 and not name.endswith(".bias") and name not in ("pos_embed", "cls_token")
            depth = depth_of(name)
            group_name = f"layer_{depth[0]}_{'decay' if decays else 'no_decay'}"
            if group_name not in groups:
                groups[group_name] = {
                    "params": [],
                    "param_names": [],
                    "group_name": group_name,
                    **({} if decays else {"weight_decay": 0.0}),
                    **self._scaled(depth),
                }
            groups[group_name]["params"].append(param)
            groups[group_name]["param_names"].append(name)
        params.extend(groups.values())


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(replaceable=True)
class LayerDecayOptimizerConstructor(LearningRateDecayOptimizerConstructor):
    """MMSegmentation's older name of :class:`LearningRateDecayOptimizerConstructor`, in the configs of BEiT.

    Args:
        optim_wrapper_cfg: see :class:`DefaultOptimWrapperConstructor`.
        paramwise_cfg: ``num_layers``, and ``layer_decay_rate`` or ``decay_rate``.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None):
        if isinstance(paramwise_cfg, Mapping) and "layer_decay_rate" in paramwise_cfg:
            rest = {key: value for key, value in paramwise_cfg.items() if key != "layer_decay_rate"}
            paramwise_cfg = {**rest, self.rate_key: paramwise_cfg["layer_decay_rate"]}
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
