"""The Triton kernels: the two passes over the plan's tables, and a small kernel between them.

A step launches, over all parameter groups at once,

1. :func:`statistics_kernel`, when there is something to find out: each program adds up the gradients of one chunk,
2. :func:`prepare_kernel`: adds up what the programs found, and derives from it and from the hyperparameters all the
   numbers that the update needs: one multiplier and whether to skip, and the rule's constants of every parameter,
3. :func:`update_kernel`: each program updates one chunk. One launch for each combination of columns' forms.

Tables are those of csrc/device/tables.h: the plan fills them in, and kernels are given addresses. The arithmetic is
that of csrc/rules, operation by operation, without contraction and with IEEE division and square root, so that results
have the bits of the other backends; columns in fewer bits are those of csrc/storage.h. What a rule adds is in
:mod:`.rules`, a file each.

Everything here runs under Triton's interpreter too, which decides what it may use: the interpreter truncates to
bfloat16, has no exact fused multiply-add and none of the device libraries, and its maximum passes over NaN.
"""

from .prepare import prepare_kernel
from .statistics import map_kernel, statistics_kernel, total_kernel
from .update import update_kernel

__all__ = ["map_kernel", "prepare_kernel", "statistics_kernel", "total_kernel", "update_kernel"]
