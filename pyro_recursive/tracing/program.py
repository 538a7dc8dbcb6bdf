"""A model and a guide with the arguments of one call: runs on given values, and the structure."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import ismethod
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_recursive.tracing.compatibility import (
    batch_shapes,
    check_batch_shape,
    check_enumerable,
    check_latent,
    check_match,
    check_sizes,
)
from pyro_recursive.tracing.enumeration import EnumeratedModel, most_values
from pyro_recursive.tracing.guide_values import axes_of, number_of_values
from pyro_recursive.tracing.handlers import DryRun, SubstituteByName
from pyro_recursive.tracing.isolation import isolated
from pyro_recursive.tracing.plates import ProgramStructure, structure_in
from pyro_recursive.tracing.sites import Site, SiteTable, sites, with_plate_sizes

FAILURES = (ValueError, torch.linalg.LinAlgError)  # of a model at values that are impossible


@dataclass(frozen=True)
class Program:
    """A model, a guide, and the arguments of this call.

    ``remembered_by`` stands for a model that is made anew in each call: what is remembered of the
    program is kept under it.
    """

    model: Callable
    guide: Callable
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    remembered_by: Callable | None = None

    @cached_property
    def memory(self) -> dict[str, Any]:
        """What is remembered of the model and the guide, for arguments of this form."""
        # Bound methods are new objects at each access: their owner and function are not.
        known_as = self.model if self.remembered_by is None else self.remembered_by
        pair = known_as, self.guide
        model, guide = (each.__self__ if ismethod(each) else each for each in pair)
        methods = tuple(each.__func__ if ismethod(each) else None for each in pair)
        try:
            if model not in _memory:
                _memory[model] = WeakKeyDictionary()
            known = _memory[model].setdefault(guide, {})
        except TypeError:  # unhashable or without weak references: look again each time
            return {}
        # A batch norm mixes rows in training only.
        training = tuple(getattr(each, "training", None) for each in (model, guide))
        key = (methods, form_of(self.args), form_of(self.kwargs), training)
        return known.setdefault(key, {})

    def run_guide(self, replayed: poutine.Trace | None = None) -> poutine.Trace:
        """Trace the guide, with the values of another trace where there is one."""
        guide = self.guide
        if replayed is not None:
            # Not `poutine.replay`: guide messengers keep the prior of their own run in `infer`.
            nodes = replayed.nodes.items()
            values = {name: site["value"] for name, site in nodes if site["type"] == "sample"}
            guide = SubstituteByName(values, override=True)(guide)
        trace = poutine.trace(guide).get_trace(*self.args, **self.kwargs)
        if isinstance(poutine.unwrap(self.guide), Messenger):
            # A guide messenger runs the model too, and what the model observes is not the guide's.
            trace = without(trace, lambda site: site["is_observed"])
        return with_plate_sizes(trace)

    def run_model(self, guide: poutine.Trace, enum_dim: int | None = None) -> poutine.Trace:
        """Trace the model on the guide's values.

        It draws what the guide lacks; with ``enum_dim`` its enumerated latents have all their
        values at once instead, in dims from that one leftwards.
        """
        model: Any = self.model
        if _draws_minibatch(guide):
            model = GivenMinibatches()(model)
        if enum_dim is not None:
            guide = _with_own_infer(guide)
            # Inside `replay`, or a guide's value would hide the dims of its prior.
            model = EnumeratedModel(model, guide.nodes.keys(), enum_dim)
        replayed = poutine.replay(model, trace=guide)
        try:
            trace = poutine.trace(replayed).get_trace(*self.args, **self.kwargs)
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(model, EnumeratedModel):
                model.check_branches(error)
            if isinstance(error, RuntimeError):
                check_latent(sites(guide))  # Pyro's error is less clear
            raise
        return with_plate_sizes(trace)


def _with_own_infer(trace: poutine.Trace) -> poutine.Trace:
    """Copy a trace and the sites' ``infer``, to which enumeration writes under `poutine.replay`."""
    copy = trace.copy()
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            copy.nodes[name] = {**site, "infer": dict(site["infer"])}
    return copy


def no_model(*args: Any, **kwargs: Any) -> None:
    """A model without sites, for a program of a guide alone."""


@contextmanager
def rows_needed(args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
    """Raise ValueError with the name of the argument without rows, where a plate has size 0."""
    try:
        yield
    except ZeroDivisionError:
        named = {**{f"argument {n}": each for n, each in enumerate(args)}, **kwargs}
        for name, value in named.items():
            if isinstance(value, torch.Tensor) and not value.numel():
                raise ValueError(
                    f"A plate cannot be empty, and {name} has shape {list(value.shape)}. "
                    "Leave out batches without rows."
                ) from None
        raise


def without(trace: poutine.Trace, unwanted: Callable[[Site], bool]) -> poutine.Trace:
    """Copy a trace, leaving out some of its sites."""
    copy = trace.copy()
    for site in list(sites(trace)):
        if unwanted(site):
            copy.remove_node(site["name"])
    return copy


class GivenMinibatches(Messenger):
    """Notes the minibatches that a model is given, and raises where another value replaces one.

    The innermost handler of the model: it sees an explicit ``subsample`` before `replay` does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is not None:
            self.values[msg["name"]] = msg["value"]

    def _pyro_post_sample(self, msg: Any) -> None:
        used = msg["value"]
        given = self.values.get(msg["name"], used)
        if given is used:
            return
        given = torch.as_tensor(given, device=used.device)
        if given.shape != used.shape or bool((given != used).any()):
            raise ValueError(
                f"The model was given a minibatch for plate '{msg['name']}', and the guide drew "
                "another: give autoguides create_plates=."
            )


def _draws_minibatch(trace: poutine.Trace) -> bool:
    return any(
        len(site["value"]) < site["fn"].size
        for site in trace.nodes.values()
        if site["type"] == "sample" and site_is_subsample(site)
    )


# By model, then guide, both held weakly: no loss remembers the first model that it saw.
_memory: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Any, dict[str, Any]]]] = (
    WeakKeyDictionary()
)


def structure_of(program: Program, *, fresh: bool = False) -> ProgramStructure:
    """Return the structure of a program, which is remembered in `Program.memory`."""
    if fresh or "structure" not in program.memory:
        program.memory["structure"] = _discover(program)
    return program.memory["structure"]


def form_of(arguments: tuple | list | dict) -> Any:
    """Return what decides which sites and plates a call has: a structure is known by it.

    Of tensors whether each dim is empty, 1, or longer: data of another form than those that a
    structure was found with may fit by chance alone. Flags, strings and None are their own form,
    and a factor of zero is another than one that is not.
    """
    if isinstance(arguments, dict):
        values = form_of(tuple(arguments.values()))
        return frozenset(zip(arguments, values, strict=True))
    forms = [
        tuple(min(size, 2) for size in each.shape)
        if isinstance(each, torch.Tensor)
        else form_of(each)
        if isinstance(each, tuple | list | dict)
        else repr(each)
        if isinstance(each, bool | str | None)
        else each == 0
        if isinstance(each, int | float)
        else None
        for each in arguments
    ]
    return tuple(forms) if isinstance(arguments, tuple) else frozenset(forms)  # lists of any length


def _discover(program: Program) -> ProgramStructure:
    with isolated(), DryRun(), rows_needed(program.args, program.kwargs):
        guide = program.run_guide()
        table = SiteTable(program.run_model(guide), guide)
        check_sizes(table)
        num_values = 1
        for record in table.enumerated_in_guide:
            check_enumerable(record.site, in_guide=True)
        guide_values = {r.name: number_of_values(r.site) for r in table.enumerated_in_guide}
        if table.enumerated:
            for record in table.enumerated:
                check_enumerable(record.site)
            trace = program.run_model(guide, -table.nesting - 2)
            num_values = most_values(trace, table.nesting)
        # Later a dim of size M * K could pass for the particle plate.
        for record in table.records:
            check_batch_shape(record.site, *batch_shapes(record.site))
        misfit = None
        try:
            check_match(table, table.nesting)
        except (ValueError, NotImplementedError) as error:
            misfit = error.with_traceback(None)  # which would keep the run's tensors
    nodes = [node for trace in table.traces for node in trace.nodes.values()]
    tensors = [node["value"] for node in nodes if isinstance(node.get("value"), torch.Tensor)]
    return replace(
        structure_in(table),
        ranks={record.name: record.site["value"].dim() for record in table.guide},
        sizes=frozenset(size for tensor in tensors for size in tensor.shape),
        num_values=num_values,
        guide_values=guide_values,
        value_axes=axes_of(table.enumerated_in_guide),
        devices=frozenset(tensor.device.type for tensor in tensors),
        misfit=misfit,
    )
