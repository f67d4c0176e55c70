"""Usage from the MMEngine family's documentation and courses: schedulers, with stock and fused optimizers."""

from __future__ import annotations

import warnings
import weakref
from functools import wraps

import pytest
import torch
from test_usage_optimizers import DummyModel
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fusedopt import FusedSGD, OptimWrapper, build_optim_wrapper
from fusedopt.training.schedulers import build_param_schedulers

# The examples draw curves without stepping the optimizer, and their base class is older than torch's.
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


@pytest.fixture(params=[SGD, FusedSGD], ids=lambda cls: cls.__name__)
def sgd(request):
    return request.param


@pytest.fixture
def model():
    return DummyModel()


@pytest.fixture
def plt(monkeypatch):
    pytest.importorskip("matplotlib").use("Agg", force=True)
    from matplotlib import pyplot

    pyplot.close("all")
    yield pyplot
    pyplot.close("all")


@pytest.fixture
def create_optimizer(sgd, model):
    def create_optimizer():
        return sgd(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    return create_optimizer


@pytest.fixture
def plot_lr(plt):
    def plot_lr(scheduler, title="", labels=["base"], nrof_epoch=100):  # noqa: B006
        lr_li = [[] for _ in range(len(labels))]
        epoch_li = list(range(nrof_epoch))
        for epoch in epoch_li:  # noqa: B007
            scheduler.step()
            lr = scheduler.get_last_lr()
            for i in range(len(labels)):
                lr_li[i].append(lr[i])
        for lr, label in zip(lr_li, labels):  # noqa: B905
            plt.plot(epoch_li, lr, label=label)
        plt.grid()
        plt.xlabel("epoch")
        plt.ylabel("lr")
        plt.title(title)
        plt.legend()
        plt.show()
        return lr_li

    return plot_lr


def lambda_foo(epoch):
    if epoch < 10:
        return (epoch + 1) * 1e-3
    elif epoch < 40:
        return 1e-2
    else:
        return 1e-3


#: Title, scheduler, and the learning rate after 1 and after 100 steps.
CURVES = [
    ("StepLR", lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1), 0.1, 1e-4),
    (
        "MultiStepLR",
        lambda optimizer: lr_scheduler.MultiStepLR(optimizer, milestones=[20, 35, 45], gamma=0.5),
        0.1,
        0.0125,
    ),
    ("LambdaLR", lambda optimizer: lr_scheduler.LambdaLR(optimizer, lr_lambda=lambda_foo), 2e-4, 1e-4),
    ("ExponentialLR", lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma=0.9), 0.09, 0.1 * 0.9**100),
    ("CosineAnnealingLR", lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10, 1e-5), 0.09755307, 0.1),
    (
        "CosineAnnealingWarmRestarts",
        lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 10, 2),
        0.09755283,
        0.1 * 0.69134,
    ),
    (
        "CyclicLR",
        lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=25, step_size_down=10),
        0.0136,
        0.055,
    ),
    ("OneCycleLR", lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100), 0.0042, 5e-5),
]


@pytest.mark.parametrize(("title", "build", "first", "last"), CURVES, ids=[curve[0] for curve in CURVES])
def test_the_curves(title, build, first, last, create_optimizer, plot_lr, plt):
    optimizer = create_optimizer()
    scheduler = build(optimizer)
    [lrs] = plot_lr(scheduler, title=title)
    assert lrs[0] == pytest.approx(first, rel=0.02)
    assert lrs[-1] == pytest.approx(last, rel=0.02)
    assert plt.gca().get_title() == title and len(plt.gca().get_lines()) == 1


def test_multiplicative_lr(sgd, model, plot_lr):
    optimizer = sgd(
        [{"params": model.base.parameters()}, {"params": model.fc.parameters(), "lr": 0.05}], lr=0.1, momentum=0.9
    )
    lambda_base = lambda epoch: 0.5 if epoch % 10 == 0 else 1  # noqa: E731
    lambda_fc = lambda epoch: 0.8 if epoch % 10 == 0 else 1  # noqa: E731
    scheduler = lr_scheduler.MultiplicativeLR(optimizer, [lambda_base, lambda_fc])
    base, fc = plot_lr(scheduler, title="MultiplicativeLR", labels=["base", "fc"])
    assert base[-1] == pytest.approx(0.1 * 0.5**10) and fc[-1] == pytest.approx(0.05 * 0.8**10)


def test_reduce_lr_on_plateau(sgd, model):
    def train(*_):
        pass

    def validate(*_):
        return 1.0

    optimizer = sgd(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = ReduceLROnPlateau(optimizer, "min")
    for epoch in range(100):
        train(epoch)
        val_loss = validate(epoch)
        scheduler.step(val_loss)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-8, rel=0.2)


class _LRScheduler(object):  # noqa: UP004
    """torch's base class as the documentation quotes it, from a version older than any that is supported here."""

    def __init__(self, optimizer, last_epoch=-1, verbose=False):
        if not isinstance(optimizer, Optimizer):
            raise TypeError("{} is not an Optimizer".format(type(optimizer).__name__))  # noqa: UP032
        self.optimizer = optimizer
        if last_epoch == -1:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        else:
            for i, group in enumerate(optimizer.param_groups):
                if "initial_lr" not in group:
                    raise KeyError(
                        "param 'initial_lr' is not specified in param_groups[{}] when resuming an optimizer".format(i)  # noqa: UP032
                    )
        self.base_lrs = list(map(lambda group: group["initial_lr"], optimizer.param_groups))  # noqa: C417
        self.last_epoch = last_epoch

        def with_counter(method):
            if getattr(method, "_with_counter", False):
                return method
            instance_ref = weakref.ref(method.__self__)
            func = method.__func__
            cls = instance_ref().__class__
            del method

            @wraps(func)
            def wrapper(*args, **kwargs):
                instance = instance_ref()
                instance._step_count += 1
                wrapped = func.__get__(instance, cls)
                return wrapped(*args, **kwargs)

            wrapper._with_counter = True
            return wrapper

        self.optimizer.step = with_counter(self.optimizer.step)
        self.optimizer._step_count = 0
        self._step_count = 0
        self.verbose = verbose
        self.step()

    def step(self):
        """What the documentation leaves to the reader."""
        self._step_count += 1
        self.last_epoch += 1
        self._get_lr_called_within_step = True
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr
        self._get_lr_called_within_step = False
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def get_last_lr(self):
        """Return last computed learning rate by current scheduler."""
        return self._last_lr

    def get_lr(self):
        raise NotImplementedError

    def print_lr(self, is_verbose, group, lr, epoch=None):
        """Display the current learning rate."""
        if is_verbose:
            if epoch is None:
                print("Adjusting learning rate of group {} to {:.4e}.".format(group, lr))  # noqa: UP032
            else:
                print("Epoch {:5d}: adjusting learning rate of group {} to {:.4e}.".format(epoch, group, lr))  # noqa: UP032

    def state_dict(self):
        return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

    def load_state_dict(self, state_dict):
        self.__dict__.update(state_dict)


class StepLR(_LRScheduler):
    """As the documentation quotes it."""

    def __init__(self, optimizer, step_size, gamma=0.1, last_epoch=-1, verbose=False):
        self.step_size = step_size
        self.gamma = gamma
        super(StepLR, self).__init__(optimizer, last_epoch, verbose)  # noqa: UP008

    def get_lr(self):
        if not self._get_lr_called_within_step:
            warnings.warn(  # noqa: B028
                "To get the last learning rate computed by the scheduler, please use `get_last_lr()`.", UserWarning
            )
        if (self.last_epoch == 0) or (self.last_epoch % self.step_size != 0):
            return [group["lr"] for group in self.optimizer.param_groups]
        return [group["lr"] * self.gamma for group in self.optimizer.param_groups]

    def _get_closed_form_lr(self):
        return [base_lr * self.gamma ** (self.last_epoch // self.step_size) for base_lr in self.base_lrs]


def test_the_documented_base_class_drives_ours(create_optimizer, plot_lr, capsys):
    optimizer = create_optimizer()
    scheduler = StepLR(optimizer, step_size=30, gamma=0.1)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert optimizer._step_count == 1
    [lrs] = plot_lr(scheduler, title="StepLR")
    assert lrs[-1] == pytest.approx(1e-4) == scheduler._get_closed_form_lr()[0]
    other = StepLR(create_optimizer(), step_size=1)
    other.load_state_dict(scheduler.state_dict())
    assert (other.last_epoch, other.step_size) == (100, 30)
    scheduler.print_lr(True, 0, 0.1)
    scheduler.print_lr(True, 0, 0.1, epoch=3)
    assert capsys.readouterr().out.splitlines() == [
        "Adjusting learning rate of group 0 to 1.0000e-01.",
        "Epoch     3: adjusting learning rate of group 0 to 1.0000e-01.",
    ]
    with pytest.warns(UserWarning, match="get_last_lr"):
        scheduler.get_lr()


num_epochs = 200

#: The ``param_scheduler`` of MMPretrain's tutorial; where it leaves arguments out with an ellipsis there are none.
TUTORIAL = {
    "one": dict(type="MultiStepLR", by_epoch=True, milestones=[100, 150], gamma=0.1),
    "cosine": dict(type="CosineAnnealingLR", by_epoch=True, T_max=num_epochs),
    "warm-up by iteration": [
        dict(type="LinearLR", start_factor=0.001, by_epoch=False, end=50),
        dict(type="MultiStepLR", by_epoch=True, milestones=[8, 11], gamma=0.1),
    ],
    "warm-up by epoch": [
        dict(type="LinearLR", start_factor=0.001, by_epoch=True, end=10, convert_to_iter_based=True),
        dict(type="CosineAnnealingLR", by_epoch=True, begin=10),
    ],
    "momentum": [
        dict(type="LinearLR"),
        dict(type="LinearMomentum", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    ],
}


@pytest.mark.parametrize("kind", ["SGD", "FusedSGD"])
@pytest.mark.parametrize("name", TUTORIAL)
def test_the_schedules_of_the_tutorial(name, kind, model):
    wrapper = build_optim_wrapper(model, dict(optimizer=dict(type=kind, lr=0.1, momentum=0.9)))
    assert isinstance(wrapper, OptimWrapper)
    schedulers = build_param_schedulers(TUTORIAL[name], wrapper, epoch_length=5, max_epochs=num_epochs, max_iters=1000)
    lrs, momenta = [], []
    for _ in range(num_epochs):
        for _ in range(5):
            lrs += wrapper.get_lr()["lr"]
            momenta += wrapper.get_momentum()["momentum"]
            wrapper.step()
            for scheduler in schedulers:
                if not scheduler.by_epoch:
                    scheduler.step()
        for scheduler in schedulers:
            if scheduler.by_epoch:
                scheduler.step()
    if name == "one":
        assert (lrs[0], lrs[499], lrs[500], lrs[-1]) == pytest.approx((0.1, 0.1, 0.01, 0.001))
    elif name == "cosine":
        assert lrs[500] == pytest.approx(0.05) and lrs[-1] == pytest.approx(6.2e-6, rel=0.01)
    elif name == "warm-up by iteration":  # the decay at epochs 8 and 11 falls into and after the 50 iterations
        assert lrs[0] == pytest.approx(1e-4) and lrs[39] < lrs[49] * 10 and lrs[-1] == pytest.approx(1e-3)
    elif name == "warm-up by epoch":
        assert (lrs[0], lrs[49], lrs[50]) == pytest.approx((1e-4, 0.1, 0.1)) and lrs[-1] < 1e-4
    else:
        assert (momenta[0], momenta[-1]) == pytest.approx((9e-4, 0.9))
        assert (lrs[0], lrs[-1]) == pytest.approx((0.1 / 3, 0.1))
