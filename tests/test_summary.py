"""What people see: print(optim_wrapper) and describe()."""

from __future__ import annotations

import torch
from torch import nn

import fusedopt
from fusedopt import AmpOptimWrapper, FusedAdamW, FusedSGD, OptimWrapper, build_optim_wrapper


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 2)


CFG = dict(
    optimizer=dict(type="FusedAdamW", lr=1e-3, weight_decay=0.05, backend="reference"),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={"head": dict(lr_mult=10)}),
)


def test_describe_is_a_table_of_parameter_shape_lr_decay_and_group():
    wrapper = build_optim_wrapper(Net(), CFG)
    assert wrapper.describe().splitlines() == [
        "parameter      shape   lr     weight_decay  group",
        "scale          scalar  0.001  0.05          0",
        "body.0.weight  4x3     0.001  0.05          1",
        "body.0.bias    4       0.001  0.05          2",
        "body.1.weight  4       0.001  0             3",
        "body.1.bias    4       0.001  0             4",
        "head.weight    2x4     0.01   0.05          5",
        "head.bias      2       0.01   0.05          6",
        "bytes per parameter: 16.8 held (parameters 4, gradients 4, states 8.8), 29.6 moved in a step, 33.6 in one "
        "that clips or checks",
    ]


def test_describe_shows_settings_as_they_are_now():
    wrapper = build_optim_wrapper(Net(), CFG)
    wrapper.param_groups[0]["lr"] = torch.tensor(0.5)
    assert wrapper.describe().splitlines()[1].split() == ["scale", "scalar", "0.5", "0.05", "0"]


def test_a_model_gives_names_and_what_is_not_trained():
    model = Net()
    model.scale.requires_grad_(False)
    wrapper = OptimWrapper(FusedSGD(model.body.parameters(), lr=0.1))
    assert "param_groups[0]['params'][1]" in wrapper.describe()
    lines = [line.split() for line in wrapper.describe(model).splitlines()]
    assert lines[1] == ["body.0.weight", "4x3", "0.1", "0", "0"]
    assert lines[-4:-1] == [
        ["scale", "scalar", "-", "-", "frozen"],
        ["head.weight", "2x4", "-", "-", "in", "no", "group"],
        ["head.bias", "2", "-", "-", "in", "no", "group"],
    ]


def test_named_parameters_name_themselves():
    wrapper = OptimWrapper(FusedAdamW(Net().named_parameters(), lr=0.1))
    assert [line.split()[0] for line in wrapper.describe().splitlines()[1:3]] == ["scale", "body.0.weight"]


def test_print_sums_up_what_has_the_same_settings():
    wrapper = build_optim_wrapper(Net(), {**CFG, "clip_grad": dict(max_norm=1.0), "accumulative_counts": 2})
    clip_grad = dict(type="norm", max_norm=1.0, norm_type=2.0, error_if_nonfinite=False)
    assert repr(wrapper).splitlines() == [
        f"OptimWrapper(accumulative_counts=2, clip_grad={clip_grad})",
        "  FusedAdamW (backend reference): 7 groups, 7 parameters, 35 elements",
        "    lr 0.001, weight_decay 0.05: 3 parameters, 17 elements: scale, body.0.weight, body.0.bias",
        "    lr 0.001, weight_decay 0: 2 parameters, 8 elements: body.1.weight, body.1.bias",
        "    lr 0.01, weight_decay 0.05: 2 parameters, 10 elements: head.weight, head.bias",
    ]


def test_print_cuts_long_lists_of_names_and_does_without_names():
    wrapper = build_optim_wrapper(Net(), dict(optimizer=dict(type="SGD", lr=0.1), paramwise_cfg=dict(bias_lr_mult=1)))
    assert repr(wrapper).endswith("35 elements: scale, body.0.weight, body.0.bias, ...")
    unnamed = build_optim_wrapper(Net(), dict(optimizer=dict(type="SGD", lr=0.1)))
    assert repr(unnamed).endswith(
        "SGD: 1 group, 7 parameters, 35 elements\n    lr 0.1, weight_decay 0: 7 parameters, 35 elements"
    )


def test_print_shows_mixed_precision():
    optimizer = torch.optim.Rprop([nn.Parameter(torch.ones(1))], lr=0.1)
    wrapper = AmpOptimWrapper(optimizer=optimizer, dtype="bfloat16", loss_scale=512.0)
    assert repr(wrapper).splitlines() == [
        "AmpOptimWrapper(accumulative_counts=1, dtype=torch.bfloat16, loss_scale=512.0)",
        "  Rprop: 1 group, 1 parameter, 1 element",
        "    lr 0.1, weight_decay -: 1 parameter, 1 element",
    ]


def test_a_lazy_parameter_has_no_shape_yet():
    with torch.no_grad():
        lazy = nn.parameter.UninitializedParameter()
    wrapper = OptimWrapper(fusedopt.FusedSGD([lazy], lr=0.1))
    assert wrapper.describe().splitlines()[1].split()[1] == "?"
    assert "1 parameter, 0 elements" in repr(wrapper)
