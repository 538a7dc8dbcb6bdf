"""Parameters and the state of their optimiser in flat buffers, of which they become views."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from pyro_recursive.tracing.graphs.unsupported import Unsupported
from pyro_recursive.training.compiled.updates import RULES, Options, Rule, Slots

DYNAMIC = {"params", "lr", "initial_lr"}  # of a parameter group; all else is fixed in a graph
SPEED_OPTIONS = {"foreach", "fused", "capturable", "differentiable"}  # of optimisers; same results
NOT_IN_UPDATE = DYNAMIC | SPEED_OPTIONS | {"initial_accumulator_value"}
GROUPS, VARYING = "_flat_groups", "_varying_options"  # attributes that optimisers are given
LARGE = 4096  # entries of a parameter that has a group for itself


class NoOptimiser(Unsupported):
    """Says that a parameter has no optimiser or a new one: an eager step makes what is missing."""


class Owners:
    """Finds the torch optimisers of parameters in the optimiser that ``present`` returns."""

    def __init__(self, present: Callable[[], PyroOptim | Optimizer]) -> None:
        self._present = present

    def all(self) -> list[Any]:
        """Return all optimisers and schedules that parameters have now."""
        optimizer = self._present()
        return [optimizer] if isinstance(optimizer, Optimizer) else [*optimizer.optim_objs.values()]

    def find(self, parameter: Tensor) -> tuple[Optimizer, dict[str, float]]:
        """Return the torch optimiser of a parameter, and its clipping."""
        optimizer = self._present()
        if isinstance(optimizer, Optimizer):
            return optimizer, {}
        found = optimizer.optim_objs.get(parameter)
        if found is None:
            raise NoOptimiser("a parameter has no optimiser")
        # A schedule has an optimiser of its own.
        return getattr(found, "optimizer", found), optimizer._get_grad_clip_args(parameter)


class Member(NamedTuple):
    """A parameter, its optimiser, its group there, and where it lies in the buffers."""

    parameter: Tensor
    optimizer: Optimizer
    group: dict[str, Any]
    start: int
    end: int
    clip: dict[str, float]  # of PyroOptim: clip_norm and clip_value of this parameter

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.end].view(self.parameter.shape)


class FlatGroup:
    """Parameters of one dtype and device: ``values``, ``slots`` of the optimiser's state,
    the number of ``steps`` done (int64, before this one) and the learning rate ``lr`` (float64).

    The last two have one entry where it is the same for all parameters, else one for each value.
    ``sums``, if it is wanted, has one tensor, to which each step adds the values after it.
    """

    def __init__(
        self, parameters: Sequence[Tensor], owners: Owners, is_summed: bool = False
    ) -> None:
        self.parameters, self.owners = list(parameters), owners
        self._find_members()
        kinds = {type(member.optimizer) for member in self.members}
        if len(kinds) != 1 or not kinds <= RULES.keys():
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            known = ", ".join(kind.__name__ for kind in RULES)
            raise Unsupported(f"optimiser {names} has no compiled form (which have: {known})")
        self.rule: Rule = RULES[kinds.pop()]
        self.options = self._read_options()
        some = parameters[0]
        size = self.size
        self.values = torch.empty(size, dtype=some.dtype, device=some.device)
        in_use = self.rule.slots(self.options)
        self.slots: Slots = {slot: torch.zeros_like(self.values) for slot in in_use}
        self.sums = [torch.zeros_like(self.values)] if is_summed else []
        self.steps = self._spread(self._counts(), torch.int64)
        self.lr = self._spread(self._rates(), torch.float64)
        self._rates_read = self._rates()
        # Each parameter, its gradient and the version of that, which is zero.
        self._gradients: list[tuple[Tensor, Tensor | None, int]] = [
            (p, None, -1) for p in parameters
        ]
        self.done = 0  # steps taken since the counts of the optimiser were written
        self.is_current = True  # no other step was taken since counts were read
        self._read = itemgetter(*self.options)
        self._options_read = [self._read(member.group) for member in self.members]
        self._clips_read = [dict(member.clip) for member in self.members]
        self.bind()
        self._check_hooks()

    @property
    def size(self) -> int:
        return self.members[-1].end

    def _find_members(self) -> None:
        """Find the optimisers that the parameters have now."""
        owners, members, start = self.owners.all(), list[Member](), 0
        for parameter in self.parameters:
            optimizer, clip = self.owners.find(parameter)
            group, end = _group_of(optimizer, parameter), start + parameter.numel()
            members.append(Member(parameter, optimizer, group, start, end, clip))
            start = end
        self.members, self._owners_read = members, owners
        self.optimizers = list({id(m.optimizer): m.optimizer for m in self.members}.values())

    @property
    def tensors(self) -> list[Tensor]:
        """All that a step reads or changes, in the order that `update` expects."""
        own = [each for each in tree_leaves(self.options) if isinstance(each, Tensor)]
        return [self.values, *self.slots.values(), self.steps, self.lr, *self.sums, *own]

    def update(
        self,
        tensors: Sequence[Tensor],
        gradients: Sequence[Tensor],
        index: Tensor,
        is_finite: Tensor | None = None,
    ) -> None:
        """Take one step in place on `tensors`, of which nothing changes where it is not finite.

        ``index`` is the step's number in a block of steps.
        """
        pairs = zip(gradients, self.members, strict=True)
        gradient = torch.cat([_clipped(g, **m.clip).reshape(-1) for g, m in pairs])
        values, *rest = tensors
        slots = dict(zip(self.slots, rest, strict=False))
        steps, lr, *own = rest[len(slots) :]
        sums, vectors = own[: len(self.sums)], iter(own[len(self.sums) :])
        options = tree_map(
            lambda each: next(vectors) if isinstance(each, Tensor) else each, self.options
        )
        if options.get("lrd", 1.0) != 1.0:
            lr = lr * options["lrd"] ** index
        count = (steps + 1).to(torch.float64)
        new, states = self.rule.update(values, gradient, slots, count, lr, options)
        changed = [(values, new), (steps, steps + 1)]
        changed += [(slots[name], state) for name, state in states.items()]
        for old, result in changed:
            if is_finite is not None:
                result = torch.where(is_finite.to(old.device), result, old)
            old.copy_(result)
        for total in sums:
            total.copy_(total + values)

    def take_sums(self) -> dict[int, Tensor]:
        """Return the sums of values over the steps since the last call, by the parameters' ids."""
        found = {id(m.parameter): m.view(s).clone() for s in self.sums for m in self.members}
        for total in self.sums:
            total.zero_()
        return found

    @torch.no_grad()
    def bind(self) -> None:
        """Copy parameters, states and step counts into the buffers; make the former two views."""
        self.is_current = False  # until all is read: it may raise
        self.write_counts()
        self._find_members()
        if any(RULES.get(type(each)) is not self.rule for each in self.optimizers):
            raise Unsupported("the kind of the optimiser")
        counts = self._spread(self._counts(), torch.int64)
        if len(counts) > len(self.steps):
            raise Unsupported("the step counts of parameters, equal at first, now differ")
        self.steps.copy_(counts)
        for optimizer in self.optimizers:
            _groups_of(optimizer).add(self)
        self._bound: list[tuple[Tensor, int, Optimizer, dict[str, Any]]] = []
        self._views: list[tuple[dict[str, Any], str, Tensor]] = []
        for member in self.members:
            state = member.optimizer.state[member.parameter]
            for name, buffer in self.slots.items():
                view = member.view(buffer)
                view.copy_(state[name])
                state[name] = view
            view = member.view(self.values)
            if member.parameter.data_ptr() != view.data_ptr():
                view.copy_(member.parameter.detach())
                member.parameter.data = view
            place = view.data_ptr()
            self._bound.append((member.parameter, place, member.optimizer, state))
            self._views += [(state, name, state[name]) for name in self.slots]
        self.is_current = True

    @property
    def is_bound(self) -> bool:
        """Whether parameters and states are still views of the buffers."""
        for parameter, place, optimizer, state in self._bound:
            if parameter.data_ptr() != place or optimizer.state.get(parameter) is not state:
                return False
        return all(state.get(name) is view for state, name, view in self._views)

    def refresh(self) -> None:
        """Take over the states, step counts, options and rates that the optimiser has now.

        Raises Unsupported where the graph does not hold for the optimiser as it is now.
        """
        same_owners = self.owners.all() == self._owners_read
        if not (same_owners and self.is_current and self.is_bound):
            self.bind()
        self._read_rates()

    def _read_rates(self) -> None:
        if self._options_read != [self._read(member.group) for member in self.members]:
            self._read_changed_options()
        if self._clips_read != [member.clip for member in self.members]:
            raise Unsupported("the clipping of gradients")
        self._check_hooks()
        rates = self._rates()
        if rates != self._rates_read:
            new = self._spread(rates, torch.float64)
            if len(new) > len(self.lr):
                raise Unsupported("learning rates of parameters, equal at first, now differ")
            self.lr.copy_(new)
            self._rates_read = rates

    def write_counts(self) -> None:
        """Give the optimiser the number of steps, which the buffers count."""
        if not self.done:
            return
        for parameter, _, optimizer, state in self._bound:
            if optimizer.state.get(parameter) is not state:
                continue  # another one, with a count of its own
            if isinstance(count := state.get("step"), Tensor):
                count += self.done
            elif count is not None:
                state["step"] = count + self.done
        self.done = 0

    @torch.no_grad()
    def release(self) -> None:
        """Give parameters storages of their own: one that is saved has all of its storage."""
        for parameter, place, _, _ in self._bound:
            if parameter.data_ptr() == place:
                parameter.data = parameter.data.clone()

    @property
    def has_gradients(self) -> bool:
        """Whether a parameter has a gradient that is not of these steps, for the next one."""
        for parameter, gradient, version in self._gradients:
            now = parameter.grad
            if now is not gradient or (now is not None and now._version != version):
                break
        else:
            return False
        found = [(m.parameter, m.parameter.grad) for m in self.members]
        self._gradients = [(p, g, -1 if g is None else g._version) for p, g in found]
        return any(gradient is not None and bool(gradient.any()) for _, gradient in found)

    def _check_hooks(self) -> None:
        for optimizer in self.optimizers:  # each has one hook, that of its flat groups
            if len(optimizer._optimizer_step_pre_hooks) > 1 or optimizer._optimizer_step_post_hooks:
                raise Unsupported("the optimiser has hooks, which see each step")

    def _read_changed_options(self) -> None:
        """Take over options that have changed: inputs of the graphs that are made from now on."""
        found = self._read_options()
        for name, old in self.options.items():
            for value, own in zip(tree_leaves(found[name]), tree_leaves(old), strict=True):
                is_input, is_tensor = (isinstance(each, Tensor) for each in (own, value))
                if is_input and is_tensor and value.numel() <= own.numel():
                    own.copy_(value)
                elif is_input or is_tensor or (value is not own and value != own):
                    for optimizer in self.optimizers:
                        vars(optimizer).setdefault(VARYING, set()).add(name)
                    raise Unsupported(f"option {name} of the optimiser")
        self._options_read = [self._read(member.group) for member in self.members]

    def _rates(self) -> list[float]:
        return [float(m.group["lr"]) * m.group.get("lrd", 1.0) for m in self.members]

    def _read_options(self) -> Options:
        found = [{k: v for k, v in m.group.items() if k not in NOT_IN_UPDATE} for m in self.members]
        return {name: self._merge(name, [each[name] for each in found]) for name in found[0]}

    def _merge(self, name: str, values: list[Any]) -> Any:
        if isinstance(values[0], tuple):
            return tuple(self._merge(name, list(each)) for each in zip(*values, strict=True))
        varies = any(name in vars(each).get(VARYING, ()) for each in self.optimizers)
        if all(value == values[0] for value in values) and not (
            varies and type(values[0]) in (int, float)
        ):
            return values[0]
        if isinstance(values[0], bool):
            raise Unsupported(f"option {name} of the optimiser differs between parameters")
        return self._spread(values, self.members[0].parameter.dtype)

    def _spread(self, values: list[Any], dtype: torch.dtype) -> Tensor:
        device = self.members[0].parameter.device
        if all(value == values[0] for value in values):
            return torch.full((1,), values[0], dtype=dtype, device=device)
        sizes = torch.tensor([m.end - m.start for m in self.members], device=device)
        return torch.tensor(values, dtype=dtype, device=device).repeat_interleave(sizes)

    def _counts(self) -> list[int]:
        for optimizer in self.optimizers:
            _write_counts(_groups_of(optimizer))  # of other graphs, too
        states = [m.optimizer.state.get(m.parameter, {}) for m in self.members]
        needed = [*self.slots, *(["step"] if self.rule.has_step_count else [])]
        if any(state.get(name) is None for state in states for name in needed):
            raise NoOptimiser("the optimiser has no state of a parameter")
        # SGD counts no steps, and only needs to know its first one.
        return [int(state["step"]) if self.rule.has_step_count else bool(state) for state in states]


def _groups_of(optimizer: Optimizer) -> set[FlatGroup]:
    """Return the groups that count steps of an optimiser, which takes these over before use."""
    if GROUPS not in vars(optimizer):
        groups = vars(optimizer)[GROUPS] = set[FlatGroup]()
        write = partial(_write_counts, groups)
        optimizer.register_state_dict_pre_hook(write)
        optimizer.register_load_state_dict_pre_hook(write)
        optimizer.register_step_pre_hook(partial(_before_step, groups))
    return vars(optimizer)[GROUPS]


def _write_counts(groups: set[FlatGroup], *args: Any) -> None:
    for group in list(groups):
        group.write_counts()
        if not group.is_bound:  # it joins again when it is
            groups.discard(group)


def _before_step(groups: set[FlatGroup], *args: Any) -> None:
    _write_counts(groups)
    for group in groups:
        group.is_current = False


def _group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(each is parameter for each in group["params"]):
            return group
    raise Unsupported("a parameter is not among those of the optimiser")


def _clipped(
    gradient: Tensor, clip_norm: float | None = None, clip_value: float | None = None
) -> Tensor:
    """Clip the gradient of one parameter as `torch.nn.utils` does."""
    if clip_norm is not None:
        gradient = gradient * (clip_norm / (gradient.norm() + 1e-6)).clamp(max=1.0)
    return gradient if clip_value is None else gradient.clamp(-clip_value, clip_value)


def advance(groups: Sequence[FlatGroup], count: int) -> None:
    """Note that a number of steps was taken, outside of the graph."""
    members = [member for group in groups for member in group.members]
    decayed = {id(m.group): m.group for m in members if m.group.get("lrd", 1.0) != 1.0}
    for group in groups:
        group.done += count
    for options in decayed.values():
        options["lr"] *= options["lrd"] ** count


def flat_groups(
    parameters: Iterable[Tensor], owners: Owners, is_summed: bool = False
) -> list[FlatGroup]:
    """Return the parameters by dtype and device: small ones together, each large one alone.

    The gradients of a group are copied together, which costs more for large ones than it saves.
    """
    found: dict[Any, list[Tensor]] = {}
    for number, parameter in enumerate(parameters):
        alone = number if parameter.numel() >= LARGE else None
        found.setdefault((parameter.dtype, parameter.device, alone), []).append(parameter)
    return [FlatGroup(each, owners, is_summed) for each in found.values()]
