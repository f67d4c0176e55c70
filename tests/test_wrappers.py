"""Optimizer wrappers: one update_params for every optimizer, fused or not, with the semantics of MMEngine."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedopt import AmpOptimWrapper, BaseOptimWrapper, FusedAdam, FusedAdamW, FusedSGD, OptimWrapper
from fusedopt.amp import GradScaler
from fusedopt.optimizers import FUSED_TWINS

SETTINGS = {
    torch.optim.SGD: dict(lr=0.05, momentum=0.9, weight_decay=0.01),
    torch.optim.Adam: dict(lr=0.02, weight_decay=0.01),
    torch.optim.AdamW: dict(lr=0.02, weight_decay=0.05),
}
STOCK_OF = {fused: stock for stock, fused in FUSED_TWINS.items()}
PAIRS = [pytest.param(stock, fused, id=stock.__name__) for stock, fused in FUSED_TWINS.items()]
CLASSES = [pytest.param(cls, id=cls.__name__) for pair in FUSED_TWINS.items() for cls in pair]
SGD_CLASSES = [pytest.param(cls, id=cls.__name__) for cls in (torch.optim.SGD, FusedSGD)]
CLIPS = [
    pytest.param(None, id="no_clip"),
    pytest.param(dict(max_norm=0.5), id="norm2"),
    pytest.param(dict(type="norm", max_norm=0.2, norm_type="inf"), id="norminf"),
    pytest.param(dict(type="value", clip_value=0.05), id="value"),
]
# One step rounds to float32 in an order of its own; Adam divides by sqrt(v), which magnifies it where v is small.
FLOAT32_TOLERANCE = dict(rtol=1e-4, atol=1e-6)
# Rounding differences in the weights become differences of a bfloat16 or float16 activation in the next forward pass.
AMP_TOLERANCE = dict(rtol=5e-3, atol=5e-4)


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def make_optimizer(cls: type, model: nn.Module, groups: int = 1, **overrides) -> torch.optim.Optimizer:
    settings = {**SETTINGS[STOCK_OF.get(cls, cls)], **overrides}
    params = list(model.parameters())
    if groups == 1:
        return cls(params, **settings)
    return cls([dict(params=params[:1], lr=0.01), dict(params=params[1:])], **settings)


def batches(count: int, size: int = 8, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draws = (torch.randn(size, 9, generator=generator, dtype=dtype) for _ in range(count))
    return [(draw[:, :6], 3 * draw[:, 6:]) for draw in draws]


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(model(batch[0]).to(batch[1].dtype), batch[1])


def train(model: nn.Module, wrapper: OptimWrapper, data) -> None:
    for batch in data:
        with wrapper.optim_context(model):
            loss = loss_of(model, batch)
        wrapper.update_params(loss)


def assert_same_parameters(left: nn.Module, right: nn.Module, **tolerance) -> None:
    for expected, actual in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, **tolerance)


def assert_equal_nested(left, right) -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right) and left.dtype == right.dtype
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_equal_nested(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_equal_nested(one, other)
    else:
        assert left == right


class TestUpdateParams:
    @pytest.mark.parametrize("clip_grad", CLIPS)
    @pytest.mark.parametrize("cls", CLASSES)
    def test_is_backward_clip_step_zero_grad(self, cls, clip_grad):
        by_hand, model = make_model(), make_model()
        optimizer = make_optimizer(STOCK_OF.get(cls, cls), by_hand)
        for batch in batches(5):
            loss_of(by_hand, batch).backward()
            if clip_grad is not None and "max_norm" in clip_grad:
                nn.utils.clip_grad_norm_(by_hand.parameters(), clip_grad["max_norm"], clip_grad.get("norm_type", 2))
            elif clip_grad is not None:
                nn.utils.clip_grad_value_(by_hand.parameters(), clip_grad["clip_value"])
            optimizer.step()
            optimizer.zero_grad()
        wrapper = OptimWrapper(make_optimizer(cls, model), clip_grad=clip_grad)
        train(model, wrapper, batches(5))
        assert_same_parameters(by_hand, model, **FLOAT32_TOLERANCE)
        assert wrapper.inner_count == 5
        assert all(param.grad is None for param in model.parameters())

    @pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")  # LBFGS of torch 2.8
    def test_hands_on_the_arguments_of_step_and_zero_grad(self):
        model = make_model()
        wrapper = OptimWrapper(torch.optim.LBFGS(model.parameters(), max_iter=2))
        (batch,) = batches(1)
        calls = []

        def closure():
            calls.append(1)
            model.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        wrapper.update_params(loss_of(model, batch), dict(closure=closure), dict(set_to_none=False))
        assert calls
        assert all(param.grad is not None and not param.grad.any() for param in model.parameters())

    @pytest.mark.parametrize("wrapper_class", [OptimWrapper, AmpOptimWrapper])
    def test_a_loss_of_another_kind_or_shape_is_an_error(self, wrapper_class):
        model = make_model()
        wrapper = wrapper_class(optimizer=make_optimizer(torch.optim.SGD, model))
        with pytest.raises(TypeError, match="loss must be a tensor of one element, got dict"):
            wrapper.update_params(dict(loss=1.0))
        with pytest.raises(TypeError, match="got float"):
            wrapper.update_params(1.0)
        with pytest.raises(ValueError, match=r"got shape \(8, 3\).*loss\.mean\(\)"):
            wrapper.update_params(model(batches(1)[0][0]))
        assert wrapper.inner_count == 0
        wrapper.update_params(loss_of(model, batches(1)[0]).reshape(1))
        assert wrapper.inner_count == 1

    # With a stock optimizer, torch's own scaler reads found_inf on the host.
    @pytest.mark.parametrize(
        ("cls", "wrapper_class"),
        [(torch.optim.SGD, OptimWrapper), (FusedSGD, OptimWrapper), (FusedSGD, AmpOptimWrapper)],
    )
    def test_reads_no_value_on_the_host(self, cls, wrapper_class, monkeypatch):
        model = make_model()
        optimizer = make_optimizer(cls, model)
        if getattr(optimizer, "backend_in_use", None) == "reference":
            pytest.skip("needs the compiled module: the reference backend reads on the host")
        wrapper = wrapper_class(optimizer=optimizer, clip_grad=dict(max_norm=0.5))
        data = batches(2)

        def refuse(*args):
            raise AssertionError("a tensor was read on the host")

        for name in ("item", "__float__", "__int__", "__bool__", "tolist"):
            monkeypatch.setattr(torch.Tensor, name, refuse)
        train(model, wrapper, data)
        reported = (wrapper.grad_norm, wrapper.clip_coef, wrapper.loss_scale, wrapper.step_was_skipped)
        monkeypatch.undo()
        norm, coefficient, _, _ = reported
        assert float(coefficient) == pytest.approx(0.5 / (float(norm) + 1e-6))


class TestFusedAgainstStock:
    """The same wrapper, config and data with either optimizer."""

    @staticmethod
    def both(stock, fused, wrapper_class, groups=1, **settings):
        for cls in (stock, fused):
            model = make_model()
            yield model, wrapper_class(optimizer=make_optimizer(cls, model, groups), **settings)

    @pytest.mark.parametrize("clip_grad", CLIPS)
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize(("stock", "fused"), PAIRS)
    def test_float32(self, stock, fused, groups, clip_grad):
        (left, ours), (right, theirs) = self.both(stock, fused, OptimWrapper, groups, clip_grad=clip_grad)
        for batch in batches(10):
            train(left, ours, [batch])
            train(right, theirs, [batch])
            if clip_grad is None or "max_norm" not in clip_grad:
                assert ours.grad_norm is theirs.grad_norm is None
                assert ours.clip_coef is theirs.clip_coef is None
            else:
                torch.testing.assert_close(ours.grad_norm, theirs.grad_norm, **FLOAT32_TOLERANCE)
                torch.testing.assert_close(ours.clip_coef, theirs.clip_coef, **FLOAT32_TOLERANCE)
            assert ours.loss_scale is theirs.loss_scale is None
            assert ours.step_was_skipped is theirs.step_was_skipped is None
        assert_same_parameters(left, right, **FLOAT32_TOLERANCE)

    @pytest.mark.parametrize("clip_grad", CLIPS)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize(("stock", "fused"), PAIRS)
    def test_mixed_precision(self, stock, fused, dtype, clip_grad):
        # 2**19 overflows float16 gradients at once, and growing every third step does so again later.
        loss_scale = dict(init_scale=2.0**19, growth_interval=3)
        pair = self.both(stock, fused, AmpOptimWrapper, clip_grad=clip_grad, dtype=dtype, loss_scale=loss_scale)
        (left, ours), (right, theirs) = pair
        skips, scales = [], []
        for batch in batches(24):
            before = copy.deepcopy(right.state_dict())
            train(left, ours, [batch])
            train(right, theirs, [batch])
            skips.append(bool(theirs.step_was_skipped))
            scales.append(float(theirs.loss_scale))
            assert bool(ours.step_was_skipped) == skips[-1]
            assert float(ours.loss_scale) == scales[-1]
            if skips[-1]:
                assert_equal_nested(before, right.state_dict())
            elif clip_grad is not None and "max_norm" in clip_grad:
                torch.testing.assert_close(ours.grad_norm, theirs.grad_norm, **AMP_TOLERANCE)
        assert_same_parameters(left, right, **AMP_TOLERANCE)
        if dtype == "float16":
            assert skips[0] and any(skips[8:]) and not all(skips), "the data must overflow early and late"
            assert max(scales) > min(scales)
        else:
            assert not any(skips)
            assert scales[-1] == 2.0**19 * 2**8

    @pytest.mark.parametrize(("stock", "fused"), PAIRS)
    def test_mixed_precision_with_accumulation(self, stock, fused):
        pair = self.both(stock, fused, AmpOptimWrapper, accumulative_counts=3, clip_grad=dict(max_norm=0.5))
        (left, ours), (right, theirs) = pair
        for model, wrapper in ((left, ours), (right, theirs)):
            wrapper.initialize_count_status(model, 0, 8)
            train(model, wrapper, batches(8))
        assert_same_parameters(left, right, **AMP_TOLERANCE)


class TestAccumulation:
    @pytest.mark.parametrize("wrapper_class", [OptimWrapper, AmpOptimWrapper])
    @pytest.mark.parametrize("cls", CLASSES)
    def test_four_batches_of_64_are_one_of_256(self, cls, wrapper_class):
        small, large = make_model(torch.float64), make_model(torch.float64)
        data = batches(8, 64, torch.float64)
        merged = [tuple(map(torch.cat, zip(*data[start : start + 4], strict=True))) for start in (0, 4)]
        # Autocast is not wanted here, where only the arithmetic of accumulation is compared.
        settings = dict(dtype="float64") if wrapper_class is AmpOptimWrapper else {}
        train(small, wrapper_class(optimizer=make_optimizer(cls, small), accumulative_counts=4, **settings), data)
        train(large, wrapper_class(optimizer=make_optimizer(cls, large), **settings), merged)
        assert_same_parameters(large, small, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("wrapper_class", [OptimWrapper, AmpOptimWrapper])
    @pytest.mark.parametrize("cls", SGD_CLASSES)
    def test_the_last_iterations_make_a_step_of_their_own(self, cls, wrapper_class):
        model = make_model()
        wrapper = wrapper_class(optimizer=make_optimizer(cls, model), accumulative_counts=4)
        wrapper.initialize_count_status(model, 0, 10)
        updates, factors, syncs = [], [], []
        for batch in batches(10):
            syncs.append(wrapper.should_sync())
            factors.append(1 / wrapper.scale_loss(torch.tensor(1.0)).item())
            wrapper.update_params(loss_of(model, batch))
            updates.append(wrapper.should_update())
        assert [index + 1 for index, updated in enumerate(updates) if updated] == [4, 8, 10]
        assert syncs == updates
        assert factors == [4] * 8 + [2] * 2
        assert (wrapper._inner_count, wrapper._max_counts, wrapper._remainder_counts) == (10, 10, 2)

    def test_the_tail_equals_a_batch_of_what_is_left(self):
        small, large = make_model(torch.float64), make_model(torch.float64)
        data = batches(7, 8, torch.float64)
        merged = [tuple(map(torch.cat, zip(*part, strict=True))) for part in (data[:3], data[3:6], data[6:])]
        wrapper = OptimWrapper(make_optimizer(torch.optim.SGD, small), accumulative_counts=3)
        wrapper.initialize_count_status(small, 0, 7)
        train(small, wrapper, data)
        train(large, OptimWrapper(make_optimizer(torch.optim.SGD, large)), merged)
        assert_same_parameters(large, small, rtol=1e-9, atol=1e-11)

    def test_without_a_total_the_factor_stays(self):
        wrapper = OptimWrapper(make_optimizer(torch.optim.SGD, make_model()), accumulative_counts=4)
        wrapper._inner_count = 9
        assert wrapper.scale_loss(torch.tensor(1.0)).item() == 0.25
        wrapper.initialize_count_status(make_model(), 8, -1)
        assert wrapper.scale_loss(torch.tensor(1.0)).item() == 0.25
        assert not wrapper.should_sync()

    def test_an_iteration_beyond_the_total_is_an_error(self):
        model = make_model()
        wrapper = OptimWrapper(make_optimizer(torch.optim.SGD, model), accumulative_counts=2)
        wrapper.initialize_count_status(model, 0, 4)
        train(model, wrapper, batches(4))
        with pytest.raises(RuntimeError, match="max_counts=4, and this is one more"):
            train(model, wrapper, batches(1))

    def test_warns_once_of_batch_norm(self, recwarn):
        wrapper = OptimWrapper(make_optimizer(torch.optim.SGD, make_model()), accumulative_counts=2)
        with pytest.warns(UserWarning, match="accumulation with BatchNorm"):
            wrapper.initialize_count_status(nn.Sequential(nn.BatchNorm1d(3)), 0, 4)
        recwarn.clear()
        wrapper.initialize_count_status(nn.Sequential(nn.BatchNorm1d(3)), 0, 4)
        wrapper.initialize_count_status(make_model(), 0, 4)
        OptimWrapper(make_optimizer(torch.optim.SGD, make_model())).initialize_count_status(nn.BatchNorm1d(3), 0, 4)
        assert not recwarn

    def test_warns_of_a_start_in_the_middle_of_a_step(self):
        wrapper = OptimWrapper(make_optimizer(torch.optim.SGD, make_model()), accumulative_counts=4)
        with pytest.warns(UserWarning, match="init_counts 6 is not divisible by accumulative_counts 4"):
            wrapper.initialize_count_status(make_model(), 6, 12)
        assert wrapper.inner_count == 6

    @pytest.mark.parametrize("wrapper_class", [OptimWrapper, AmpOptimWrapper])
    def test_optim_context_enters_no_sync_where_no_step_follows(self, wrapper_class):
        class Replica(nn.Linear):
            entered = 0

            @contextlib.contextmanager
            def no_sync(self):
                self.entered += 1
                yield

        model = Replica(6, 3)
        wrapper = wrapper_class(optimizer=make_optimizer(torch.optim.SGD, model), accumulative_counts=3)
        wrapper.initialize_count_status(model, 0, 5)
        entered = []
        for batch in batches(5):
            train(model, wrapper, [batch])
            entered.append(model.entered)
        assert entered == [1, 2, 2, 3, 3], "only iterations 3 and 5 synchronize"


class TestClipping:
    @pytest.mark.parametrize("cls", CLASSES)
    def test_the_settings_are_checked_and_never_changed(self, cls):
        clip_grad = dict(type="norm", max_norm=1.0, norm_type=2)
        OptimWrapper(make_optimizer(cls, make_model()), clip_grad=clip_grad)
        assert clip_grad == dict(type="norm", max_norm=1.0, norm_type=2)
        for bad, error, message in (
            (dict(max_norm=-1.0), ValueError, "max_norm"),
            (dict(max_nrom=1.0), ValueError, "did you mean 'max_norm'"),
            (dict(type="nrom", max_norm=1.0), ValueError, "unknown type 'nrom'"),
            (dict(type="value"), TypeError, "needs 'clip_value'"),
            ({}, TypeError, "needs 'max_norm'"),
            (1.0, TypeError, "must be a dict or None"),
        ):
            with pytest.raises(error, match=message):
                OptimWrapper(make_optimizer(cls, make_model()), clip_grad=bad)

    def test_a_fused_optimizer_gets_the_setting(self):
        optimizer = make_optimizer(FusedAdamW, make_model())
        OptimWrapper(optimizer, clip_grad=dict(max_norm=35, norm_type=2))
        assert optimizer.clip_grad == dict(type="norm", max_norm=35, norm_type=2.0, error_if_nonfinite=False)

    def test_set_on_both_is_an_error(self):
        optimizer = make_optimizer(FusedAdamW, make_model(), clip_grad=dict(max_norm=1.0))
        with pytest.raises(ValueError, match=r"clip_grad is set on both the wrapper .* and the optimizer"):
            OptimWrapper(optimizer, clip_grad=dict(max_norm=2.0))
        assert optimizer.clip_grad["max_norm"] == 1.0
        assert OptimWrapper(optimizer).optimizer.clip_grad["max_norm"] == 1.0

    @pytest.mark.parametrize("cls", SGD_CLASSES)
    def test_error_if_nonfinite_raises_on_a_non_finite_norm(self, cls):
        model = make_model()
        before = copy.deepcopy(model.state_dict())
        clip_grad = dict(max_norm=1.0, error_if_nonfinite=True)
        for wrapper in (
            OptimWrapper(make_optimizer(cls, model), clip_grad=clip_grad),
            AmpOptimWrapper(loss_scale=dict(enabled=False), optimizer=make_optimizer(cls, model), clip_grad=clip_grad),
        ):
            with pytest.raises(RuntimeError, match="total norm"):
                wrapper.update_params(loss_of(model, batches(1)[0]) * float("inf"))
            assert_equal_nested(before, model.state_dict())

    @pytest.mark.parametrize("cls", SGD_CLASSES)
    def test_error_if_nonfinite_leaves_an_overflow_to_the_scaler(self, cls):
        model = make_model()
        before = copy.deepcopy(model.state_dict())
        wrapper = AmpOptimWrapper(
            dtype="float16",
            loss_scale=dict(init_scale=2.0**40),
            optimizer=make_optimizer(cls, model),
            clip_grad=dict(max_norm=1.0, error_if_nonfinite=True),
        )
        train(model, wrapper, batches(1))
        assert_equal_nested(before, model.state_dict())
        assert bool(wrapper.step_was_skipped)
        assert not torch.isfinite(wrapper.grad_norm)
        assert float(wrapper.loss_scale) == 2.0**39
        train(model, wrapper, batches(40))
        assert torch.isfinite(wrapper.grad_norm) and not bool(wrapper.step_was_skipped)

    @pytest.mark.parametrize("cls", SGD_CLASSES)
    def test_the_reported_norm_is_that_of_the_unscaled_gradients(self, cls):
        model, reference = make_model(), make_model()
        (batch,) = batches(1)
        loss_of(reference, batch).backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        wrapper = AmpOptimWrapper(
            dtype="float32", loss_scale=1024.0, optimizer=make_optimizer(cls, model), clip_grad=dict(max_norm=0.1)
        )
        assert wrapper.grad_norm is None and wrapper.clip_coef is None and wrapper.step_was_skipped is None
        train(model, wrapper, [batch])
        torch.testing.assert_close(wrapper.grad_norm, norm)
        torch.testing.assert_close(wrapper.clip_coef, 0.1 / (norm + 1e-6))
        assert wrapper.grad_norm.dim() == wrapper.clip_coef.dim() == wrapper.step_was_skipped.dim() == 0
        assert not bool(wrapper.step_was_skipped)

    @pytest.mark.parametrize("clip_grad", [dict(max_norm=1.0), dict(type="value", clip_value=1.0)])
    def test_a_step_without_gradients_does_not_clip(self, clip_grad):
        wrapper = OptimWrapper(make_optimizer(torch.optim.SGD, make_model()), clip_grad=clip_grad)
        wrapper.step()
        assert wrapper.grad_norm is None


class TestAmp:
    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [
            (None, torch.get_autocast_dtype("cpu")),
            ("bfloat16", torch.bfloat16),
            ("float16", torch.float16),
            (torch.float16, torch.float16),
            ("float32", torch.float32),
            ("float64", torch.float32),  # torch's CPU autocast knows the two half types only and stays off
        ],
    )
    def test_optim_context_autocasts(self, dtype, expected):
        model = make_model()
        wrapper = AmpOptimWrapper(dtype=dtype, optimizer=make_optimizer(torch.optim.SGD, model))
        with wrapper.optim_context(model):
            assert model(torch.ones(1, 6)).dtype == expected
        assert model(torch.ones(1, 6)).dtype == torch.float32

    @pytest.mark.parametrize("cls", SGD_CLASSES)
    def test_loss_scale_dynamic(self, cls):
        model = make_model()
        wrapper = AmpOptimWrapper(optimizer=make_optimizer(cls, model))
        assert float(wrapper.loss_scale) == 65536.0
        train(model, wrapper, batches(1))
        assert float(wrapper.loss_scale) == 65536.0
        assert wrapper.loss_scaler.get_growth_interval() == 2000

    @pytest.mark.parametrize("cls", SGD_CLASSES)
    @pytest.mark.parametrize("loss_scale", [512.0, 512])
    def test_loss_scale_static_stays(self, cls, loss_scale):
        model = make_model()
        wrapper = AmpOptimWrapper(loss_scale=loss_scale, optimizer=make_optimizer(cls, model))
        train(model, wrapper, batches(2))
        wrapper.update_params(loss_of(model, batches(1)[0]) * float("inf"))
        assert bool(wrapper.step_was_skipped)
        assert float(wrapper.loss_scale) == 512.0

    def test_the_loss_scale_is_where_the_parameters_are(self):
        wrapper = AmpOptimWrapper(optimizer=FusedSGD([nn.Parameter(torch.ones(1))], lr=0.1))
        wrapper.optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(1, device="meta"))]
        assert wrapper.loss_scale.device.type == "meta", "before the first loss, too"

    def test_loss_scale_dict_is_the_scalers_arguments(self):
        loss_scale = dict(init_scale=8.0, growth_interval=1, growth_factor=4.0)
        model = make_model()
        wrapper = AmpOptimWrapper(loss_scale=loss_scale, optimizer=make_optimizer(FusedAdamW, model))
        before = wrapper.loss_scale
        train(model, wrapper, batches(1))
        after = wrapper.loss_scale
        train(model, wrapper, batches(1))
        assert (float(before), float(after), float(wrapper.loss_scale)) == (8.0, 32.0, 128.0)
        assert loss_scale == dict(init_scale=8.0, growth_interval=1, growth_factor=4.0)

    def test_a_disabled_scaler_scales_nothing(self):
        model = make_model()
        wrapper = AmpOptimWrapper(loss_scale=dict(enabled=False), optimizer=make_optimizer(FusedSGD, model))
        train(model, wrapper, batches(2))
        assert wrapper.loss_scale is None and wrapper.step_was_skipped is None

    @pytest.mark.parametrize("loss_scale", ["static", None, [1.0], True])
    def test_another_loss_scale_is_a_type_error(self, loss_scale):
        with pytest.raises(TypeError, match="loss_scale must be 'dynamic', a number or a dict"):
            AmpOptimWrapper(loss_scale=loss_scale, optimizer=make_optimizer(torch.optim.SGD, make_model()))

    def test_the_other_arguments_are_checked(self):
        optimizer = make_optimizer(torch.optim.SGD, make_model())
        with pytest.raises(TypeError, match="the optimizer is passed by keyword"):
            AmpOptimWrapper(optimizer)
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'optimizer'"):
            AmpOptimWrapper()
        with pytest.raises(ValueError, match="loss_scale"):
            AmpOptimWrapper(loss_scale=0.0, optimizer=optimizer)
        with pytest.raises(TypeError, match=r"\{'int_scale': 1\.0\}: unknown key 'int_scale'; .*'init_scale'"):
            AmpOptimWrapper(loss_scale=dict(int_scale=1.0), optimizer=optimizer)
        with pytest.raises(ValueError, match="Invalid dtype: 'bf16'; "):
            AmpOptimWrapper(dtype="bf16", optimizer=optimizer)
        with pytest.raises(ValueError, match=r"Invalid dtype: torch\.int8"):
            AmpOptimWrapper(dtype=torch.int8, optimizer=optimizer)
        with pytest.raises(TypeError, match="dtype must be the name of a dtype"):
            AmpOptimWrapper(dtype=16, optimizer=optimizer)
        with pytest.raises(TypeError, match="use_fsdp must be True or False, got 'yes'"):
            AmpOptimWrapper(use_fsdp="yes", optimizer=optimizer)
        assert type(AmpOptimWrapper(use_fsdp=True, optimizer=optimizer).loss_scaler) is GradScaler


class TestParamGroups:
    @pytest.mark.parametrize("cls", SGD_CLASSES)
    def test_one_group(self, cls):
        optimizer = make_optimizer(cls, make_model())
        wrapper = OptimWrapper(optimizer)
        assert wrapper.base_param_settings is None
        assert wrapper.param_groups is optimizer.param_groups
        assert wrapper.defaults is optimizer.defaults
        assert wrapper.get_lr() == {"lr": [0.05]}
        assert wrapper.get_momentum() == {"momentum": [0.9]}

    @pytest.mark.parametrize("cls", SGD_CLASSES)
    def test_several_groups_have_base_param_settings_in_the_wrapper(self, cls):
        optimizer = make_optimizer(cls, make_model(), groups=2)
        wrapper = OptimWrapper(optimizer)
        assert len(optimizer.param_groups) == 2
        assert len(wrapper.param_groups) == 3
        assert wrapper.param_groups[2] is wrapper.base_param_settings
        base = {key: value for key, value in wrapper.base_param_settings.items() if key != "params"}
        assert base == optimizer.defaults
        assert torch.equal(wrapper.base_param_settings["params"], torch.tensor([0.0]))
        assert wrapper.get_lr() == {"base_lr": [0.05], "lr": [0.01, 0.05]}
        for group in wrapper.param_groups:
            group["lr"] *= 0.5
        assert wrapper.get_lr() == {"base_lr": [0.025], "lr": [0.005, 0.025]}
        assert optimizer.defaults["lr"] == 0.05

    def test_momentum_is_momentum_else_the_first_beta_else_0(self):
        params = [nn.Parameter(torch.ones(1))]
        assert OptimWrapper(torch.optim.Adam(params, betas=(0.8, 0.9))).get_momentum() == {"momentum": [0.8]}
        assert OptimWrapper(FusedAdam(params, betas=(0.8, 0.9))).get_momentum() == {"momentum": [0.8]}
        assert OptimWrapper(torch.optim.Adagrad(params)).get_momentum() == {"momentum": [0]}

    def test_a_group_scheduled_before_the_wrapper_was_made(self):
        optimizer = make_optimizer(torch.optim.SGD, make_model(), groups=2)
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5)
        assert OptimWrapper(optimizer).get_lr() == {"base_lr": [0.05], "lr": [0.005, 0.025]}


DIRECTIONS = ["raw", "fp32", "amp"]


def make_side(kind: str, cls: type, groups: int):
    """A model, a function that trains it, and what saves and loads: the optimizer itself or a wrapper."""
    model = make_model()
    optimizer = make_optimizer(cls, model, groups)
    if kind == "amp":
        wrapper = AmpOptimWrapper(dtype="float32", loss_scale=dict(growth_interval=2), optimizer=optimizer)
    else:
        wrapper = OptimWrapper(optimizer)
    return model, wrapper, optimizer if kind == "raw" else wrapper


class TestStateDict:
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("target", DIRECTIONS)
    @pytest.mark.parametrize("source", DIRECTIONS)
    @pytest.mark.parametrize(("saved_by", "loaded_by"), [(s, f) for p in FUSED_TWINS.items() for s in p for f in p])
    def test_goes_from_any_to_any(self, saved_by, loaded_by, source, target, groups):
        model, wrapper, saver = make_side(source, saved_by, groups)
        train(model, wrapper, batches(3))
        saved = saver.state_dict()
        assert set(saved) == {"state", "param_groups"} | ({"loss_scaler"} if source == "amp" else set()) | (
            {"base_param_settings"} if groups > 1 and source != "raw" else set()
        )
        before = copy.deepcopy(saved)

        other, other_wrapper, loader = make_side(target, loaded_by, groups)
        other.load_state_dict(model.state_dict())
        loader.load_state_dict(saved)
        assert_equal_nested(before, saved)
        if source == target == "amp":
            assert float(other_wrapper.loss_scale) == float(wrapper.loss_scale) == 2.0**17

        # A copy, since torch's own optimizers share the loaded tensors with the dict, as always.
        loader.load_state_dict(copy.deepcopy(saved))
        train(model, wrapper, batches(3))
        train(other, other_wrapper, batches(3))
        assert_same_parameters(model, other, **FLOAT32_TOLERANCE)

    @pytest.mark.parametrize("wrapper_class", [OptimWrapper, AmpOptimWrapper])
    def test_the_base_settings_travel_and_are_not_shared(self, wrapper_class):
        make = lambda: wrapper_class(optimizer=make_optimizer(FusedSGD, make_model(), groups=2))  # noqa: E731
        source, target = make(), make()
        source.param_groups[-1]["lr"] = 0.7
        saved = source.state_dict()
        target.load_state_dict(saved)
        assert target.get_lr()["base_lr"] == [0.7]
        target.param_groups[-1]["lr"] = 0.1
        source.param_groups[-1]["lr"] = 0.2
        assert saved["base_param_settings"]["lr"] == 0.7

    def test_what_the_optimizer_refuses_changes_nothing(self):
        source = AmpOptimWrapper(loss_scale=2.0, optimizer=make_optimizer(FusedSGD, make_model(), groups=2))
        single = AmpOptimWrapper(optimizer=make_optimizer(FusedSGD, make_model()))
        with pytest.raises(ValueError, match="different number of parameter groups"):
            single.load_state_dict(source.state_dict())
        assert single.base_param_settings is None
        assert float(single.loss_scale) == 65536.0

    @pytest.mark.parametrize(
        ("scaler_state", "error", "message"),
        [
            ({"x": 1}, KeyError, "has no 'scale', 'growth_factor'.*returns, got 'x'"),
            ({"growth_interval": "often"}, ValueError, r"\['growth_interval'\] must be a number, got 'often'"),
            (3, TypeError, r"state_dict\['loss_scaler'\] must be a dict"),
        ],
    )
    def test_what_the_scaler_refuses_changes_nothing(self, scaler_state, error, message):
        single, source = (AmpOptimWrapper(optimizer=make_optimizer(FusedAdam, make_model())) for _ in range(2))
        source.param_groups[0]["lr"] = 0.5
        saved = source.state_dict()
        if error is ValueError:
            scaler_state = {**saved["loss_scaler"], **scaler_state}
        with pytest.raises(error, match=message):
            single.load_state_dict({**saved, "loss_scaler": scaler_state})
        assert single.get_lr() == {"lr": [0.02]}

    @pytest.mark.parametrize("wrapper_class", [OptimWrapper, AmpOptimWrapper])
    def test_none_is_a_type_error(self, wrapper_class):
        wrapper = wrapper_class(optimizer=make_optimizer(FusedAdam, make_model()))
        with pytest.raises(TypeError, match=r"state_dict must be a dict.*got NoneType"):
            wrapper.load_state_dict(None)

    def test_the_state_of_a_disabled_scaler_leaves_the_scale(self):
        disabled = AmpOptimWrapper(
            loss_scale=dict(enabled=False), optimizer=make_optimizer(torch.optim.SGD, make_model())
        )
        wrapper = AmpOptimWrapper(optimizer=make_optimizer(torch.optim.SGD, make_model()))
        wrapper.load_state_dict(disabled.state_dict())
        disabled.load_state_dict(wrapper.state_dict())
        assert float(wrapper.loss_scale) == 65536.0 and disabled.loss_scale is None

    @pytest.mark.parametrize("cls", SGD_CLASSES)
    def test_survives_a_checkpoint_file(self, cls, tmp_path):
        model = make_model()
        wrapper = AmpOptimWrapper(optimizer=make_optimizer(cls, model, groups=2), clip_grad=dict(max_norm=1.0))
        train(model, wrapper, batches(2))
        torch.save(wrapper.state_dict(), tmp_path / "checkpoint.pt")
        loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert_equal_nested(wrapper.state_dict(), loaded)
        wrapper.load_state_dict(loaded)

    @pytest.mark.parametrize("cls", SGD_CLASSES)
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda wrapper: pickle.loads(pickle.dumps(wrapper))])
    def test_a_wrapper_can_be_copied(self, cls, duplicate):
        model = make_model()
        wrapper = AmpOptimWrapper(optimizer=make_optimizer(cls, model), clip_grad=dict(max_norm=1.0))
        train(model, wrapper, batches(2))
        twin = duplicate(wrapper)
        assert_equal_nested(wrapper.state_dict(), twin.state_dict())


class TestConstruction:
    def test_arguments_are_checked(self):
        optimizer = make_optimizer(torch.optim.SGD, make_model())
        with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got dict"):
            OptimWrapper(dict(type="SGD"))
        with pytest.raises(TypeError, match=r"accumulative_counts must be an int, got 2\.0"):
            OptimWrapper(optimizer, accumulative_counts=2.0)
        with pytest.raises(ValueError, match="accumulative_counts must be at least 1, got 0"):
            OptimWrapper(optimizer, accumulative_counts=0)
        with pytest.raises(TypeError, match="abstract"):
            BaseOptimWrapper(optimizer)


@pytest.mark.parametrize("SGD", SGD_CLASSES)
class TestFragments:
    """The code of the tutorial on optimizer wrappers that this API was asked for with."""

    @pytest.fixture
    def data(self):
        inputs = [torch.zeros(10, 1, 1)] * 10
        targets = [torch.ones(10, 1, 1)] * 10
        return inputs, targets

    def test_single_precision(self, SGD, data):
        inputs, targets = data
        plain = nn.Linear(1, 1)
        model = copy.deepcopy(plain)
        optimizer = SGD(plain.parameters(), lr=0.01)
        optimizer.zero_grad()
        for input, target in zip(inputs, targets, strict=True):
            output = plain(input)
            loss = F.l1_loss(output, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        optimizer = SGD(model.parameters(), lr=0.01)
        optim_wrapper = OptimWrapper(optimizer=optimizer)
        for input, target in zip(inputs, targets, strict=True):
            output = model(input)
            loss = F.l1_loss(output, target)
            optim_wrapper.update_params(loss)
        assert_same_parameters(plain, model)

    @pytest.mark.parametrize("settings", [{}, dict(accumulative_counts=2)])
    def test_mixed_precision_and_accumulation(self, SGD, data, settings):
        inputs, targets = data
        model = nn.Linear(1, 1)
        optimizer = SGD(model.parameters(), lr=0.01)
        before = model.bias.item()
        optim_wrapper = AmpOptimWrapper(optimizer=optimizer, **settings)
        for input, target in zip(inputs, targets, strict=True):
            with optim_wrapper.optim_context(model):
                output = model(input)
                loss = F.l1_loss(output, target)
            optim_wrapper.update_params(loss)
        steps = 10 // settings.get("accumulative_counts", 1)
        assert optim_wrapper.inner_count == 10
        assert abs(model.bias.item() - before) == pytest.approx(0.01 * steps, rel=0.05)

    def test_learning_rate_and_momentum(self, SGD):
        model = nn.Linear(1, 1)
        optimizer = SGD(model.parameters(), lr=0.01)
        optim_wrapper = OptimWrapper(optimizer)
        assert optimizer.param_groups[0]["lr"] == 0.01
        assert optimizer.param_groups[0]["momentum"] == 0
        assert optim_wrapper.get_lr() == {"lr": [0.01]}
        assert optim_wrapper.get_momentum() == {"momentum": [0]}

    def test_state_dicts_of_wrappers_around_one_optimizer(self, SGD):
        model = nn.Linear(1, 1)
        optimizer = SGD(model.parameters(), lr=0.01)
        optim_wrapper = OptimWrapper(optimizer=optimizer)
        amp_optim_wrapper = AmpOptimWrapper(optimizer=optimizer)
        optim_state_dict = optim_wrapper.state_dict()
        amp_optim_state_dict = amp_optim_wrapper.state_dict()
        assert set(amp_optim_state_dict) - set(optim_state_dict) == {"loss_scaler"}
        optim_wrapper_new = OptimWrapper(optimizer=optimizer)
        amp_optim_wrapper_new = AmpOptimWrapper(optimizer=optimizer)
        amp_optim_wrapper_new.load_state_dict(amp_optim_state_dict)
        optim_wrapper_new.load_state_dict(optim_state_dict)
        assert_equal_nested(amp_optim_wrapper_new.state_dict(), amp_optim_state_dict)
        assert_equal_nested(optim_wrapper_new.state_dict(), optim_state_dict)


@pytest.mark.parametrize("kind", [FusedSGD, torch.optim.SGD])
def test_mmengines_names_for_a_subclass_with_its_own_step(kind):
    class Own(OptimWrapper):
        def step(self, **kwargs):
            if self.clip_grad_kwargs:
                self._clip_grad()
            self.optimizer.step(**kwargs)

    parameter = nn.Parameter(torch.ones(4))
    wrapper = Own(kind([parameter], lr=1.0), clip_grad=dict(type="norm", max_norm=1.0))
    assert wrapper.clip_grad_kwargs == dict(max_norm=1.0, norm_type=2.0, error_if_nonfinite=False)
    wrapper.update_params((10 * parameter).sum())
    torch.testing.assert_close(parameter.detach(), torch.full((4,), 0.5))
    assert OptimWrapper(kind([parameter], lr=1.0)).clip_grad_kwargs is None
