"""The part that all fused optimizers share: torch's optimizer protocol around one backend."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.compiler import is_dynamo_compiling
from torch.optim import optimizer as optimizer_module
from torch.optim.optimizer import ParamsT

from ..backends import Backend, BackendUnavailable, StepReport, StepRequest, check_backend_name, create_backend
from ..backends.base import device_of
from ..messages import check_flag, check_no_model, plain, plain_groups
from ..rules import HiddenCounts, Hyperparameters, NormClip, Precision, Rule, ValueClip, counted_key, parse_clip_grad
from ..shards import (
    Shards,
    agree_on_parameters,
    is_flat_shard,
    refuse_scaling_by_shares,
    refuse_what_cannot_be_added_up,
    refuse_what_was_left_behind,
    share_being_made,
    state_is_being_made,
    tell_calling_scaler,
)
from ..undo import parameter_groups, unchanged_on_error
from .backward import refuse_part_of_a_norm
from .contents import Contents
from .given_norm import with_given_norm
from .ignored import note_ignored_flags
from .kept import check_kept, setting_of_precision
from .known import Known, add_group, while_constructing
from .loading import read_state_dict, shallow_copy
from .new_group import check_new_group
from .outside import outside_of_graphs
from .pickling import own_settings, own_state, take_state
from .saving import leave_out_unreal_state, make_settings_plain, make_state_portable
from .shared import Shared, handed_over, reach_through_accelerate

__all__ = ["FusedOptimizer"]


class FusedOptimizer(Contents, torch.optim.Optimizer):
    """Base of the fused optimizers; not for direct use.

    A step reads the gradients at most twice and does not write them: once to find their norm or non-finite values,
    when somebody asked, and once to update every parameter of every group.

    Args:
        params: as for any ``torch.optim`` optimizer: tensors, named tensors, or group dicts.
        settings: the validated defaults.
        clip_grad: gradient clipping inside the step, see :func:`fusedopt.rules.parse_clip_grad`.
        write_back_grads: leave the unscaled, clipped gradients in ``.grad`` after a step that was not skipped.
        backend: ``'auto'`` (the first that can serve the parameters' devices), ``'native'``, ``'triton'`` or
            ``'reference'``. In place of 'auto', ``FUSEDOPT_BACKEND`` in the environment may name one.
        state_dtype, master, stochastic_rounding, ema: in what form state is kept, see :class:`FusedAdam`.

    Attributes:
        rule: the maths.
        stock: the class of ``torch.optim`` with the same arguments and state, if there is one: :func:`fuse` takes it.
    """

    rule: ClassVar[Rule]
    stock: ClassVar[type[torch.optim.Optimizer] | None] = None
    _known: Known | None = None  # see Note [Groups while constructing]

    grad_scale = handed_over("grad_scale")
    found_inf = handed_over("found_inf")

    state_dtype = setting_of_precision("state_dtype")
    master = setting_of_precision("master")
    stochastic_rounding = setting_of_precision("stochastic_rounding")
    ema = setting_of_precision("ema")

    def __init__(
        self,
        params: ParamsT,
        settings: Hyperparameters,
        *,
        clip_grad: Mapping[str, Any] | None = None,
        write_back_grads: bool = False,
        backend: str = "auto",
        state_dtype: str | torch.dtype | Mapping[str, Any] | None = None,
        master: str | None = None,
        stochastic_rounding: bool | Mapping[str, int] = False,
        ema: Mapping[str, Any] | None = None,
    ):
        self._precision = Precision.parse(self.rule, state_dtype, master, stochastic_rounding, ema)
        self._shared = Shared(parse_clip_grad(clip_grad), plain(write_back_grads))
        self._shared.share_of = share_being_made()
        check_backend_name(backend)
        self.backend = backend
        self._backend: Backend | None = None
        check_no_model(params)
        if not isinstance(params, (Tensor, Mapping)):
            params = list(params)  # type: ignore[assignment]
            if not params:
                raise ValueError(
                    "optimizer got an empty parameter list (a generator such as model.parameters() gives its "
                    "parameters only once: pass list(model.parameters()) to use them twice)"
                )
        with unchanged_on_error(*parameter_groups(params)):  # see Note [What fails changes nothing]
            with while_constructing(self):
                super().__init__(params, settings.as_defaults())
            if isinstance(self._shared.clip, NormClip):
                refuse_what_cannot_be_added_up(self.param_groups)
            self._precision.check(self.rule, self.param_groups)
            self._settle()
            self.backend_in_use  # noqa: B018  raises now, not in the first step, when the backend cannot serve
            note_ignored_flags(self.defaults)

    def _settle(self) -> None:
        """What both a new and an unpickled optimizer need beside torch's own attributes."""
        reach_through_accelerate()
        self._introduced = False  # see _introduce()
        self._counts = HiddenCounts(self) if self.rule.hides_step else None
        self.register_state_dict_post_hook(make_state_portable, prepend=True)
        self.register_state_dict_post_hook(leave_out_unreal_state, prepend=True)
        self.register_state_dict_post_hook(make_settings_plain, prepend=True)

    @property
    def clip_grad(self) -> dict[str, Any] | None:
        """Gradient clipping inside the step: None, or a copy of the validated settings. Assigning validates."""
        clip = self._shared.clip
        return None if clip is None else clip.as_dict()

    @clip_grad.setter
    def clip_grad(self, value: Mapping[str, Any] | NormClip | ValueClip | None) -> None:
        clip = parse_clip_grad(value)
        if isinstance(clip, NormClip):
            refuse_what_cannot_be_added_up(self.param_groups)
        self._shared.clip = clip

    @property
    def write_back_grads(self) -> bool:
        """Whether a step that was not skipped leaves the unscaled, clipped gradients in ``.grad``."""
        return self._shared.write_back_grads

    @write_back_grads.setter
    def write_back_grads(self, value: bool) -> None:
        self._shared.write_back_grads = plain(value)

    @property
    def last_step(self) -> StepReport | None:
        """The :class:`~fusedopt.backends.StepReport` of the last step, None before the first."""
        return self._shared.last_step

    @last_step.setter
    def last_step(self, value: StepReport | None) -> None:
        self._shared.last_step = value

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a stock ``torch.amp.GradScaler`` hands over its scale, instead of unscaling the gradients itself.

        False makes it keep the optimizer from stepping after an overflow, where somebody has to see that; where a model
        is sharded, it must be a scaler that asks the other processes then. By default it is True. The name is torch's.
        """
        takes_scale = self._shared.takes_scale is not False
        if not takes_scale and self._first_is_flat_shard():
            refuse_scaling_by_shares(self.param_groups)
        return takes_scale

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self._shared.takes_scale = check_flag("_step_supports_amp_scaling", value)

    def _first_is_flat_shard(self) -> bool:
        params = self.param_groups[0]["params"]
        return bool(params) and is_flat_shard(params[0])

    @property
    def backend_in_use(self) -> str:
        """Name of the backend that runs the steps of this optimizer's parameters where they are now."""
        return self._chosen_backend().name

    def _chosen_backend(self) -> Backend:
        backend = self._backend
        if backend is None or backend.unproved:
            params = [param for group in self.param_groups for param in group["params"]]
            devices, dtypes = {param.device for param in params}, {param.dtype for param in params}
            backend = self._backend = create_backend(self.backend, self.rule, devices, dtypes, backend, self._precision)
            backend.shards.share_of = self._shared.share_of
        return backend

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``torch.optim.Optimizer.add_param_group``, checking its settings and parameters first.

        An error leaves the group as it was.

        Raises:
            TypeError: a parameter is sparse, complex, a tensor subclass with its own dispatch, or not a tensor.
            ValueError: a setting is out of range, a parameter appears twice, ``params`` is a used-up generator, the
                group has its own ``clip_grad`` or ``state_dtype``, or no process could know the norm
                that is to be clipped.
        """
        check_new_group(self.rule, self._precision, self.defaults, param_group, len(self.param_groups))
        groups, count = self.param_groups, len(self.param_groups)
        restored = parameter_groups([param_group])
        with unchanged_on_error(*restored, finally_undo=lambda: groups.__delitem__(slice(count, None))):
            add_group(self, super().add_param_group, param_group)
            plain_groups(self.param_groups[-1:])
            check_kept(self.rule, self._precision, self.param_groups[-1], len(self.param_groups) - 1)
            if self._known is None and isinstance(self._shared.clip, NormClip):  # the constructor asks once, at its end
                refuse_what_cannot_be_added_up(self.param_groups)
            self._backend, self._introduced = None, False

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float | Tensor] | None = None,
        *,
        grad_scale: Tensor | float | None = None,
        found_inf: Tensor | None = None,
        grad_norm: Tensor | float | None = None,
    ) -> float | Tensor | None:
        """Perform one optimization step over all parameter groups.

        Args:
            closure: re-evaluates the model and returns the loss.
            grad_scale: the gradients are divided by it (a GradScaler's scale: 0-dim tensor or number). Without
                ``found_inf`` the step looks for non-finite gradients itself and is skipped when there are any.
            found_inf: 0-dim tensor; non-zero skips the step. Given, the gradients are not searched.
            grad_norm: the norm to clip by, of all unscaled gradients, from somebody who knows it: 0-dim tensor or
                number. The gradients are then read once only, and it tells whether they are finite.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: see :meth:`fusedopt.backends.Backend.step`. Nothing has been changed then.
            TypeError, ValueError: ``grad_norm`` is no norm, or there is no clipping by one.

        A stock ``torch.amp.GradScaler`` hands both over as attributes of the same names instead. A ``grad_scale``
        attribute set by the user multiplies the argument, as it multiplies the scaler's in torch; a ``found_inf``
        attribute beside a ``grad_scale`` argument is not looked at.
        """
        if is_dynamo_compiling() or get_eval_frame_callback() is not None:  # Note [Compiled callers]
            return self._step_outside_of_graphs(
                closure, grad_scale=grad_scale, found_inf=found_inf, grad_norm=grad_norm
            )
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or optimizer_module._global_optimizer_pre_hooks
            or optimizer_module._global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()
        ):
            # Hooks are shown the arguments that were given, and may replace them.
            given: dict[str, Any] = {"closure": closure, "grad_scale": grad_scale, "found_inf": found_inf}
            given["grad_norm"] = grad_norm
            return self._step_with_hooks(**{key: value for key, value in given.items() if value is not None})
        return self._step(closure, grad_scale=grad_scale, found_inf=found_inf, grad_norm=grad_norm)

    # torch wraps every `step` in a profiler range and a walk over hooks, which together take as long as the update of
    # a small model. Marked as hooked, ours goes through torch's wrapper only when there is a hook or a profiler.
    step.hooked = True  # type: ignore[attr-defined]

    # Note [Compiled callers]: there is nothing to gain inside a step by torch.compile, and much to break its graphs. So
    # a compiled caller gets this: torch.compiler.disable, put around at its first use, since that takes seconds to
    # import, and by itself as long as a tenth of a small step. A caller is compiled while Dynamo traces it, and also
    # where it runs as it is after a graph break: Dynamo would look at each function that is called from there.
    _step_outside_of_graphs = outside_of_graphs(step)

    def _step(
        self,
        closure: Callable[[], float | Tensor] | None = None,
        *,
        grad_scale: Tensor | float | None = None,
        found_inf: Tensor | None = None,
        grad_norm: Tensor | float | None = None,
    ) -> float | Tensor | None:
        loss, shared = None, self._shared
        if shared.averaged:
            self._refuse_while_averaged("step()")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        clip, asked = shared.clip, shared.next
        if asked is not None and not asked.check_gradients():
            asked = shared.next = None
        if asked is not None:
            clip = asked.clip
            grad_norm = asked.norm if grad_norm is None else grad_norm  # found already
        if grad_norm is None and type(clip) is NormClip:
            refuse_part_of_a_norm()
        if not self._introduced:
            self._introduce()
        request, scalars = shared.request(grad_scale, found_inf), None
        if grad_norm is not None:
            request, scalars = with_given_norm(request, grad_norm, self.param_groups)
        if not self.state and self._shards.domains is not None and state_is_being_made():
            request = StepRequest()
        try:  # as _served(), one call shorter
            report = self._chosen_backend().step(self.param_groups, self.state, request, self._counts)
        except BackendUnavailable:
            report = self._served("step", request)
        shared.last_step = report = report if scalars is None else StepReport(scalars, report.found_inf)
        if asked is not None:
            asked.stepped(report)
            shared.next = None
        if (
            shared.found_inf is not None
            and report.found_inf is not None
            and (scalars is not None or self._shards.domains is not None)  # the step knows more than the scaler
        ):
            tell_calling_scaler(report.found_inf)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``. A clipping of the next step that a trainer asked for is dropped."""
        asked = self._shared.next
        if asked is not None:
            self._shared.next = None
            asked.dropped()
        super().zero_grad(set_to_none)

    def _served(self, half: str, request: StepRequest) -> Any:
        """What a backend's ``step``, or ``begin``, makes of a request."""
        try:
            return getattr(self._chosen_backend(), half)(self.param_groups, self.state, request, self._counts)
        except BackendUnavailable:
            # Parameters have moved to another device since: choose again, and raise if that does not help.
            self._backend = None
            return getattr(self._chosen_backend(), half)(self.param_groups, self.state, request, self._counts)

    def _introduce(self) -> None:
        """Before the first step: what the other processes and the model would otherwise find out too late."""
        shards = self._shards
        shards(self.param_groups)
        if shards.domains is not None:
            settings = {"class": type(self).__name__, "clip_grad": self.clip_grad}
            settings |= {} if self._precision.is_plain else self._precision.settings(self.rule)
            agree_on_parameters(shards.domains, self.param_groups, settings, shares=shards.share_of is not None)
        refuse_what_was_left_behind(self.param_groups)
        self._introduced = True

    @property
    def _shards(self) -> Shards:
        return self._chosen_backend().shards

    @property
    def _device(self) -> torch.device:
        return device_of(self.param_groups)

    _step_with_hooks = torch.optim.Optimizer.profile_hook_step(_step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer or of torch's optimizer of the same name.

        State is converted to this optimizer's ``state_dtype``, ``master`` and ``ema``, which one warning says. Without
        a ``state_dtype``, state tensors that are wider than the parameter stay so (torch casts them to its dtype). A
        master or an average that is not in the dict begins as the parameter. State moves to its device. What
        torch fills in, because it has added it to its layout over time, is filled in. A parameter without an entry has
        not stepped. A ``step`` in the group, where apex, Transformer Engine and DeepSpeed keep it, is the count of
        parameters whose moments are there. Where both sides have names of parameters, state goes by them.

        Raises:
            ValueError: another number of groups, another group size, a state tensor of another shape than its
                parameter; a setting, a state tensor or a step count that is missing or of another kind; state of
                another optimizer; names that contradict the order. The message names the parameter or group, the key
                and what is there. Nothing has been changed then.
            KeyError, TypeError: ``state_dict`` is no optimizer state dict.
        """
        reach_through_accelerate()
        self._refuse_while_averaged("load_state_dict()")
        # torch casts in a static method that a subclass cannot replace, hence this own load path.
        state_dict = shallow_copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        loaded = read_state_dict(self.rule, self.param_groups, state_dict, type(self).__name__, self._precision)
        self.__setstate__({"state": defaultdict(dict, loaded.state), "param_groups": loaded.param_groups})
        self._take_counts(loaded.counts)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _take_counts(self, counts: Mapping[Tensor, Tensor]) -> None:
        """Hidden counts of the state as it is now."""
        if self._counts is not None:
            self._counts.clear()
            for param, count in counts.items():
                key = counted_key(self.rule, self.state[param])
                assert key is not None
                self._counts.put(param, self.state[param][key], count)

    def __repr__(self) -> str:
        lines = "".join(f"    {name}: {value}\n" for name, value in own_settings(self).items())
        return f"{super().__repr__().removesuffix(')')}Over all groups\n{lines})"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **own_state(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        take_state(self, state, super().__setstate__)
