"""Reduction domains: over which processes what is found of a gradient has to be added up.

A *domain* is a set of process groups. The gradient of a parameter that is dealt out along some dimensions of a mesh
has its other parts in the processes along these; along the others each has the same, which counts once. Parameters are
sorted into the few domains there are, and a step adds up over each group, in a fixed order, what it found in the
domains that the group is in: one collective for each group, whatever the number of parameters. Every process joins each
of them, with or without gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..messages import is_dtensor, parameter_name
from .flat import flat_groups, is_flat_shard
from .reduction import add_up, combined

__all__ = ["Domains", "Shards", "find_domains", "refuse_what_cannot_be_added_up"]

#: The groups that one domain consists of, in the order in which they are added up over.
Reach = tuple[Any, ...]


class Domains:
    """The reduction domains of an optimizer, or of several that clip by one norm.

    Args:
        reaches: the groups of each domain, () for what every process has.
        meshes: of the parameters that are dealt out, with their names.

    Attributes:
        problem: why totals cannot be added up, which is raised when that is asked for; or None.
    """

    def __init__(self, reaches: Sequence[Reach], meshes: Sequence[tuple[str, Any]] = ()):
        self.reaches = list(reaches)
        self.problem = _problem_of_meshes(meshes)
        self._meshes = meshes
        self._steps: list[tuple[Any, list[int]]] = []  # a group, and the domains that it is in
        for number, reach in enumerate(self.reaches):
            for group in reach:
                known = next((rows for each, rows in self._steps if each is group), None)
                if known is None:
                    self._steps.append((group, known := []))
                known.append(number)

    @classmethod
    def joined(cls, several: Iterable[Domains | None]) -> Domains:
        """The domains of several optimizers one after the other; None for an optimizer all of which is here."""
        reaches: list[Reach] = []
        meshes: list[tuple[str, Any]] = []
        for domains in several:
            reaches += [()] if domains is None else domains.reaches
            meshes += () if domains is None else domains._meshes
        return cls(reaches, meshes)

    @property
    def groups(self) -> list[Any]:
        """The process groups, in the order in which they are added up over."""
        return [group for group, _ in self._steps]

    def add_up(self, totals: Tensor, *, largest: bool) -> Tensor:
        """What all processes found.

        Args:
            totals: of this process, float64, (domains, 2): a total, and non-zero where a gradient is not finite.
            largest: whether a total is the largest magnitude, rather than a sum of powers.

        Returns:
            Pairs, (domains, 2), whose totals taken together are that of all gradients; some pair tells that one is not
            finite if one is in any process of any group. The same to the bit in every process.

        Raises:
            ValueError: the domains are such that nobody has all of them.
        """
        if self.problem is not None:
            raise ValueError(self.problem)
        if len(self.reaches) == 1:
            for group in self.reaches[0]:
                totals = add_up(totals, group, largest=largest)
            return totals
        rows = list(totals.unbind(0))
        for group, mine in self._steps:
            part = torch.stack([rows[number] for number in mine])
            # What is not finite in one domain stops all, whoever they add up with.
            part[:, 1] = torch.stack(rows)[:, 1].amax()
            for number, total in zip(mine, add_up(part, group, largest=largest).unbind(0), strict=True):
                rows[number] = total
        return torch.stack(rows)

    def agree(self, flag: Tensor | float, device: torch.device) -> Tensor:
        """Whether ``flag`` is set in any process of any group: 0-dim float32, 1 or 0."""
        mine = _flag(flag, device)
        totals = torch.stack([torch.zeros_like(mine), mine]).expand(len(self.reaches), 2)
        return self.add_up(totals, largest=False)[:, 1].amax().ne(0).float()


def _flag(found_inf: Tensor | float, device: torch.device) -> Tensor:
    return torch.as_tensor(found_inf, device=device).detach().reshape(()).ne(0).double()


class Shards:
    """The domains of an optimizer's parameters as they are now. A plan calls it whenever it has read them anew, see
    Note [A step in two halves] in csrc/plan/plan.h.

    Attributes:
        share_of: the process group whose processes each have a share of the parameters, as under ZeRO; or None.
        domains: None where each process has all of every gradient.
    """

    def __init__(self) -> None:
        self.share_of: Any = None
        self.domains: Domains | None = None
        self._numbers: dict[int, int] = {}  # by the id of a parameter
        self._seen: Any = None

    def refresh(self, param_groups: Sequence[Mapping[str, Any]]) -> None:
        """Call it if these are other parameters than in the last call of this, or others of them are flat shards."""
        seen = [(id(param), is_flat_shard(param)) for *_, param in _each(param_groups)]
        if seen != self._seen:
            self(param_groups)
            self._seen = seen

    def __call__(self, param_groups: Sequence[Mapping[str, Any]]) -> tuple[list[int], int] | None:
        """The domain of each parameter, in the order of the groups, and how many there are; None for one and here."""
        found = find_domains(param_groups, self.share_of)
        self.domains, self._numbers = None, {}
        if found is None:
            return None
        self.domains, numbers = found
        self._numbers = {id(param): number for (*_, param), number in zip(_each(param_groups), numbers, strict=True)}
        return numbers, self.count

    @property
    def count(self) -> int:
        """The number of domains."""
        return 1 if self.domains is None else len(self.domains.reaches)

    def domain_of(self, param: Tensor) -> int:
        """The number of a parameter's domain."""
        return self._numbers.get(id(param), 0)

    def here(self, totals: Tensor | None, device: torch.device, norm_type: float | None) -> Tensor:
        """What was found in this process, float64, (domains, 2).

        Args:
            totals: float64, (devices, domains, 2); None where no parameter took part.
            device: where the parameters are.
            norm_type: of the norm that the totals are for, or None.
        """
        if totals is None:
            return torch.zeros((self.count, 2), dtype=torch.float64, device=device)
        return totals[0] if totals.shape[0] == 1 else combined(totals.transpose(0, 1), largest=norm_type == math.inf)

    def added_up(
        self,
        totals: Tensor | None,
        device: torch.device,
        norm_type: float | None,
        found_inf: Tensor | float | None = None,
    ) -> Tensor:
        """What was found in all processes, as pairs: see :meth:`here` and :meth:`Domains.add_up`.

        Note [Flags that are given]: a step that is told whether there was an overflow does not look for one, but
        another process may have been told something else. So ``found_inf`` takes the place of what was found here of
        that, and the step is made as if it had looked. Nothing of this where all is here.
        """
        here = self.here(totals, device, norm_type)
        if self.domains is None:
            return here
        if found_inf is not None:
            here = torch.stack((here[:, 0], _flag(found_inf, device).expand(here.shape[0])), dim=1)
        return self.domains.add_up(here, largest=norm_type == math.inf)


def _each(param_groups: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], int, int, Tensor]]:
    for g, group in enumerate(param_groups):
        for i, param in enumerate(group["params"]):
            yield group, g, i, param


def find_domains(param_groups: Sequence[Mapping[str, Any]], share_of: Any = None) -> tuple[Domains, list[int]] | None:
    """The domains of an optimizer's parameters and, in the order of the groups, the number of each parameter's.

    None where no parameter has parts in other processes.

    Args:
        param_groups: the optimizer's.
        share_of: see :class:`Shards`.

    Raises:
        ValueError: a parameter is dealt out over a mesh that this process is no part of, or in a way that nobody knows.
    """
    if share_of is not None:
        whole = share_of.size() == 1
        return None if whole else (Domains([(share_of,)]), [0 for _ in _each(param_groups)])
    flat = [param for *_, param in _each(param_groups) if is_flat_shard(param)]
    groups_of_flat = flat_groups(flat) if flat else {}
    numbers: dict[Reach, int] = {}
    indices = []
    meshes: list[tuple[str, Any]] = []
    for group, g, i, param in _each(param_groups):
        reach: Reach = ()
        if is_dtensor(param):
            name = parameter_name(group, g, i)
            reach = _groups_of_dtensor(name, param)
            if reach:
                meshes.append((name, param.device_mesh))  # type: ignore[attr-defined]
        elif is_flat_shard(param):
            if id(param) not in groups_of_flat:
                raise ValueError(
                    f"{parameter_name(group, g, i)} belongs to FullyShardedDataParallel, but no model has it: was this "
                    "optimizer made before the model was wrapped? Expected an optimizer of the wrapped model's "
                    "parameters. (After gc.freeze() Python does not tell of the model: freeze after the first step)"
                )
            over = groups_of_flat[id(param)]
            reach = () if over is None or over.size() == 1 else (over,)
        indices.append(numbers.setdefault(reach, len(numbers)))
    if not any(numbers):
        return None
    return Domains(list(numbers), meshes), indices


def _groups_of_dtensor(name: str, param: Any) -> Reach:
    mesh = param.device_mesh
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"{name} is dealt out over a mesh of the processes {_ranks(mesh)}, to which this one does not belong; "
            "expected an optimizer of the parameters that this process has a part of"
        )
    # Whatever is not a replica is a shard: what has to be added up first is no parameter (see check_parameter).
    dims = [dim for dim, placement in enumerate(param.placements) if not placement.is_replicate()]
    return tuple(mesh.get_group(dim) for dim in dims if mesh.size(dim) > 1)


def _ranks(mesh: Any) -> list[int]:
    return sorted(mesh.mesh.flatten().tolist())


def _root_of(mesh: Any) -> Any:
    own = getattr(mesh, "_get_root_mesh", None)
    if own is not None:
        return own()
    from torch.distributed.device_mesh import _mesh_resources  # of older torch

    return _mesh_resources.get_root_mesh(mesh)


def _problem_of_meshes(meshes: Sequence[tuple[str, Any]]) -> str | None:
    """Why parameters on these meshes have no norm together, or None.

    Meshes with the same processes, or cut out of meshes with the same, are all known to each of them. Of others a
    process may be in one only, and adds up a part.
    """
    for name, mesh in meshes[1:]:
        first, first_mesh = meshes[0]
        if mesh is first_mesh or _ranks(_root_of(mesh)) == _ranks(_root_of(first_mesh)):
            continue
        return (
            f"{first} is dealt out over {first_mesh}, {name} over {mesh}, meshes without a common root: no process "
            "knows the norm of all gradients. Expected meshes cut out of one (init_device_mesh once, then "
            "mesh['name'])"
        )
    return None


def refuse_what_cannot_be_added_up(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where the gradients of these groups have no norm that the processes could find together."""
    found = find_domains(param_groups)
    if found is not None and found[0].problem is not None:
        raise ValueError(found[0].problem)
