"""Schedulers of learning rates, momenta and any other entry of parameter groups, as ``mmengine.optim``'s."""

from .base import INF, LRSchedulerMixin, MomentumSchedulerMixin, _ParamScheduler
from .build import build_param_schedulers
from .cosine import (
    CosineAnnealingLR,
    CosineAnnealingMomentum,
    CosineAnnealingParamScheduler,
    CosineAnnealingWeightDecay,
    CosineRestartLR,
    CosineRestartMomentum,
    CosineRestartParamScheduler,
)
from .from_torch import SWALR, CosineAnnealingWarmRestarts, CyclicLR, LambdaLR, MultiplicativeLR, TorchParamScheduler
from .one_cycle import OneCycleLR, OneCycleParamScheduler
from .plateau import ReduceLROnPlateau, ReduceOnPlateauLR, ReduceOnPlateauMomentum, ReduceOnPlateauParamScheduler
from .plot import plot_schedule
from .ramps import LinearLR, LinearMomentum, LinearParamScheduler, PolyLR, PolyMomentum, PolyParamScheduler
from .simulate import Schedule, simulate_schedule
from .stepwise import (
    ConstantLR,
    ConstantMomentum,
    ConstantParamScheduler,
    ExponentialLR,
    ExponentialMomentum,
    ExponentialParamScheduler,
    MultiStepLR,
    MultiStepMomentum,
    MultiStepParamScheduler,
    StepLR,
    StepMomentum,
    StepParamScheduler,
)

__all__ = [
    "INF",
    "SWALR",
    "ConstantLR",
    "ConstantMomentum",
    "ConstantParamScheduler",
    "CosineAnnealingLR",
    "CosineAnnealingMomentum",
    "CosineAnnealingParamScheduler",
    "CosineAnnealingWarmRestarts",
    "CosineAnnealingWeightDecay",
    "CosineRestartLR",
    "CosineRestartMomentum",
    "CosineRestartParamScheduler",
    "CyclicLR",
    "ExponentialLR",
    "ExponentialMomentum",
    "ExponentialParamScheduler",
    "LRSchedulerMixin",
    "LambdaLR",
    "LinearLR",
    "LinearMomentum",
    "LinearParamScheduler",
    "MomentumSchedulerMixin",
    "MultiStepLR",
    "MultiStepMomentum",
    "MultiStepParamScheduler",
    "MultiplicativeLR",
    "OneCycleLR",
    "OneCycleParamScheduler",
    "PolyLR",
    "PolyMomentum",
    "PolyParamScheduler",
    "ReduceLROnPlateau",
    "ReduceOnPlateauLR",
    "ReduceOnPlateauMomentum",
    "ReduceOnPlateauParamScheduler",
    "Schedule",
    "StepLR",
    "StepMomentum",
    "StepParamScheduler",
    "TorchParamScheduler",
    "_ParamScheduler",
    "build_param_schedulers",
    "plot_schedule",
    "simulate_schedule",
]
