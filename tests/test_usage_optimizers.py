"""Usage from the MMEngine family's documentation and courses: optimizers, stock and fused, as users write them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import CrossEntropyLoss
from torch.optim import SGD

from fusedopt import OPTIMIZERS, FusedSGD, OptimWrapper


class DummyModel(nn.Module):
    def __init__(self, class_num=10):
        super(DummyModel, self).__init__()  # noqa: UP008
        self.base = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 128, kernel_size=3, padding=1),
            nn.ReLU(),
        )
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(128, class_num)

    def forward(self, x):
        x = self.base(x)
        x = self.gap(x)
        x = x.view(x.shape[0], -1)
        x = self.fc(x)
        return x


def test_every_optimizer_of_the_list_is_registered():
    first = ("SGD", "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW")
    for name in (*first, "Adamax", "SparseAdam", "RMSprop", "Rprop", "LBFGS"):
        assert OPTIMIZERS.get(name) is getattr(torch.optim, name)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", ["RMSprop", "Adam", "FusedAdam"])
def test_basic_use(kind, wrapped, capsys):
    x = torch.linspace(-np.pi, np.pi, 2000)
    y = torch.sin(x)
    p = torch.tensor([1, 2, 3])
    xx = x.unsqueeze(-1).pow(p)
    model = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0, 1))
    loss_fn = torch.nn.MSELoss(reduction="sum")
    learning_rate = 1e-3
    optimizer = OPTIMIZERS.build(dict(type=kind, lr=learning_rate), model.parameters())
    wrapper = OptimWrapper(optimizer)
    for t in range(1, 1001):
        y_pred = model(xx)
        loss = loss_fn(y_pred, y)
        if t % 100 == 0:
            print(f"No.{t: 5d}, loss: {loss.item():.6f}")
        if wrapped:
            wrapper.update_params(loss)
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    losses = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 10 and losses[-1] < losses[0] / 2


@pytest.mark.parametrize("cls", [SGD, FusedSGD])
def test_groups_with_learning_rates_of_their_own(cls):
    model = DummyModel()
    optimizer = cls(
        [{"params": model.base.parameters()}, {"params": model.fc.parameters(), "lr": 1e-3}], lr=1e-2, momentum=0.9
    )
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 2]
    assert OptimWrapper(optimizer).get_lr() == {"base_lr": [1e-2], "lr": [1e-2, 1e-3]}


@pytest.mark.parametrize("cls", [SGD, FusedSGD])
def test_a_closure(cls, capsys):
    dummy_model = DummyModel()
    optimizer = cls(dummy_model.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-4)
    loss_fn = CrossEntropyLoss()
    batch_size = 2
    data = torch.randn(64, 3, 64, 128)
    data_label = torch.randint(0, 10, size=(64,), dtype=torch.long)
    for batch_index in range(10):
        batch_data = data[batch_index * batch_size : batch_index * batch_size + batch_size]
        batch_label = data_label[batch_index * batch_size : batch_index * batch_size + batch_size]

        def closure():
            optimizer.zero_grad()
            output = dummy_model(batch_data)  # noqa: B023
            loss = loss_fn(output, batch_label)  # noqa: B023
            loss.backward()
            print(f"No.{batch_index: 2d} loss: {loss.item():.6f}")  # noqa: B023
            return loss

        optimizer.step(closure=closure)
    assert capsys.readouterr().out.count("loss: ") == 10


@pytest.mark.parametrize("cls", [SGD, FusedSGD])
def test_autocast_by_hand(cls):
    model = nn.Linear(1, 1)
    optimizer = cls(model.parameters(), lr=0.01)
    before = model.bias.item()
    inputs = [torch.zeros(10, 1, 1, 1)] * 10
    targets = [torch.ones(10, 1, 1, 1)] * 10
    for input, target in zip(inputs, targets, strict=True):
        with torch.autocast("cpu"):
            output = model(input)
            loss = nn.functional.l1_loss(output, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.bias.item() - before == pytest.approx(0.01 * 10, rel=1e-3)


@pytest.mark.parametrize("cls", [SGD, FusedSGD])
def test_autocast_and_accumulation_by_hand(cls):
    inputs = [torch.zeros(10, 1, 1)] * 10
    targets = [torch.ones(10, 1, 1)] * 10
    model = nn.Linear(1, 1)
    optimizer = cls(model.parameters(), lr=0.01)
    before = model.bias.item()
    for idx, (input, target) in enumerate(zip(inputs, targets, strict=True)):
        with torch.autocast("cpu"):
            output = model(input)
            loss = nn.functional.l1_loss(output, target)
        loss.backward()
        if idx % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
    # The first step has one gradient, the other four have two each.
    assert model.bias.item() - before == pytest.approx(0.01 * 9, rel=1e-3)
