"""Usage from the MMEngine family's documentation and courses: stochastic weight averaging."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import Module
from torch.optim import SGD

from fusedopt import FusedSGD
from fusedopt.training.averaging import SWALR, StochasticWeightAverage


class AveragedModel(Module):
    """As the documentation quotes it from torch 1.7."""

    def __init__(self, model, device=None, avg_fn=None):
        super(AveragedModel, self).__init__()  # noqa: UP008
        self.module = deepcopy(model)
        if device is not None:
            self.module = self.module.to(device)
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long, device=device))
        if avg_fn is None:

            def avg_fn(averaged_model_parameter, model_parameter, num_averaged):
                return averaged_model_parameter + (model_parameter - averaged_model_parameter) / (num_averaged + 1)

        self.avg_fn = avg_fn

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def update_parameters(self, model):
        for p_swa, p_model in zip(self.parameters(), model.parameters()):  # noqa: B905
            device = p_swa.device
            p_model_ = p_model.detach().to(device)
            if self.n_averaged == 0:
                p_swa.detach().copy_(p_model_)
            else:
                p_swa.detach().copy_(self.avg_fn(p_swa.detach(), p_model_, self.n_averaged.to(device)))
        self.n_averaged += 1


def update_bn(loader, model, device=None):
    """As the documentation quotes it from torch 1.7."""
    momenta = {}
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean = torch.zeros_like(module.running_mean)
            module.running_var = torch.ones_like(module.running_var)
            momenta[module] = module.momentum
    if not momenta:
        return
    was_training = model.training
    model.train()
    for module in momenta:
        module.momentum = None
        module.num_batches_tracked *= 0
    for input in loader:
        if isinstance(input, (list, tuple)):
            input = input[0]
        if device is not None:
            input = input.to(device)
        model(input)
    for bn_module in momenta:
        bn_module.momentum = momenta[bn_module]
    model.train(was_training)


loss_fn = nn.CrossEntropyLoss()


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def loader():
    return [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(2)]


@pytest.mark.parametrize("cls", [SGD, FusedSGD])
def test_the_documented_class_and_ours_keep_the_same_average(cls, model, loader):
    optimizer = cls(model.parameters(), lr=0.1, momentum=0.9)
    averages = [AveragedModel(model), torch.optim.swa_utils.AveragedModel(model), StochasticWeightAverage(model)]
    for _ in range(5):
        for input, target in loader:
            optimizer.zero_grad()
            loss_fn(model(input), target).backward()
            optimizer.step()
        for average in averages:
            average.update_parameters(model)
    assert not torch.equal(averages[0].module[0].weight, model[0].weight)
    update_bn(loader, averages[0])
    for average in averages[1:]:
        torch.optim.swa_utils.update_bn(loader, average)
        for ours, theirs in zip(average.module.state_dict().values(), averages[0].module.state_dict().values()):  # noqa: B905
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("cls", [SGD, FusedSGD])
@pytest.mark.parametrize("average", [torch.optim.swa_utils.AveragedModel, StochasticWeightAverage])
def test_swalr_example(cls, average, model, loader):
    optimizer = cls(model.parameters(), lr=0.5)
    swa_model = average(model)
    lr_lambda = lambda epoch: 0.9  # noqa: E731
    scheduler = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lr_lambda=lr_lambda)
    swa_scheduler = torch.optim.swa_utils.SWALR(optimizer, anneal_strategy="linear", anneal_epochs=20, swa_lr=0.05)
    assert SWALR is torch.optim.swa_utils.SWALR
    swa_start = 160
    for i in range(300):
        for input, target in loader:
            optimizer.zero_grad()
            loss_fn(model(input), target).backward()
            optimizer.step()
        if i > swa_start:
            swa_scheduler.step()
        else:
            scheduler.step()
        if i == swa_start:
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.9**161)
    # Update bn statistics for the swa_model at the end
    torch.optim.swa_utils.update_bn(loader, swa_model)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    first, second = (input for input, _ in loader)
    hidden = [
        nn.functional.linear(each, swa_model.module[0].weight, swa_model.module[0].bias) for each in (first, second)
    ]
    torch.testing.assert_close(swa_model.module[1].running_mean, torch.cat(hidden).mean(0), atol=1e-6, rtol=1e-5)
