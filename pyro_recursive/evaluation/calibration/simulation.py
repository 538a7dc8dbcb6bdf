"""Data simulated from a model, in the place of the data in its arguments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.evaluation.draws.model_runs import (
    data_of,
    drawing_data,
    is_factor,
    was_observed,
)
from pyro_recursive.tracing.densities import log_prob_of
from pyro_recursive.tracing.sites import Site, sites

__all__ = ["Replace", "Simulated", "simulate"]

# The argument (position or keyword) of each observed site's data; or a function from the simulated
# values by site, the positional and the keyword arguments to new (args, kwargs).
Replace = Mapping[str, int | str] | Callable[[dict[str, Tensor], tuple, dict[str, Any]], Any]


@dataclass(frozen=True)
class Simulated:
    """A simulated data set: arguments with new data, and the trace that these are from.

    In the trace no data are observed; ``latent`` are the sites that are latent in the model.
    """

    args: tuple
    kwargs: dict[str, Any]
    trace: poutine.Trace

    @property
    def latent(self) -> list[Site]:
        """The sites of the model's latents."""
        return [site for site in sites(self.trace) if _is_latent(site)]


@torch.no_grad()
def simulate(
    model: Callable, args: tuple, kwargs: dict[str, Any], replace: Replace | None = None
) -> Simulated:
    """Draw latents and data from a model, and put the data where its arguments have them.

    :param model: a Pyro model whose observed data are among its arguments
    :param replace: where; None finds the one argument that each observed site has its value from
    :raises ValueError: that is not clear; the model is no distribution of its data (`pyro.factor`);
        it takes its data as inputs, too. Names the site and what to do
    :raises NotImplementedError: a latent site is masked

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1e-6), obs=x)
    >>> found = simulate(model, (torch.tensor(7.0),), {})
    >>> bool((found.args[0] - found.trace.nodes["z"]["value"]).abs() < 1e-4)
    True
    """
    with poutine.block():
        trace = poutine.trace(drawing_data(model)).get_trace(*args, **kwargs)
        observed = {site["name"]: site for site in sites(trace) if was_observed(site)}
        _check_generative(trace, observed)
        if callable(replace):
            values = {name: site["value"] for name, site in observed.items()}
            new_args, new_kwargs = replace(values, args, dict(kwargs))
        else:
            new_args, new_kwargs = _replaced(observed, args, kwargs, replace)
        found = Simulated(tuple(new_args), new_kwargs, trace)
        again = poutine.trace(poutine.replay(model, trace=trace))
        _check_same(trace, again.get_trace(*found.args, **found.kwargs))
    return found


def _is_latent(site: Site) -> bool:
    """Whether a site is drawn, but not in the place of data; computed ones are not."""
    return not site["is_observed"] and not was_observed(site)


def _check_generative(trace: poutine.Trace, observed: dict[str, Site]) -> None:
    for site in sites(trace):
        if is_factor(site):
            raise ValueError(
                f"Site '{site['name']}' is a pyro.factor, from which no data can be drawn: "
                "simulated data would not have the model's density. Write it as a distribution of "
                "data."
            )
    if not observed:
        raise ValueError("The model observes nothing: there are no data to simulate.")
    for site in sites(trace):
        if isinstance(site["mask"], Tensor) and _is_latent(site):
            raise NotImplementedError(
                f"Latent site '{site['name']}' is masked: where it is, it has no prior to be drawn "
                "from. Pass data without missing entries."
            )


def _replaced(
    observed: dict[str, Site], args: tuple, kwargs: dict[str, Any], given: Mapping | None
) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments with simulated values, as far as it is clear where they go."""
    found = _places(args, kwargs)
    taken: dict[int | str, str] = {}
    for name in given or ():
        if name not in observed:
            raise ValueError(f"replace= names '{name}'; the observed sites are {list(observed)}.")
    for name, site in observed.items():
        place = given[name] if given and name in given else _place_of(site, args, kwargs)
        if place not in found or place in taken:
            cause = f"is also that of '{taken[place]}'" if place in taken else "is not there"
            raise ValueError(
                f"Argument {place!r}, for the data of site '{name}', {cause}. {_REMEDY}"
            )
        taken[place] = name
        found[place] = _shaped(site, found[place], place)
    return [found[i] for i in range(len(args))], {key: found[key] for key in kwargs}


_REMEDY = (
    "Name the argument of each site, replace={site: position or keyword}; or give a function, "
    "replace=lambda simulated, args, kwargs: (new_args, new_kwargs)."
)


def _place_of(site: Site, args: tuple, kwargs: dict[str, Any]) -> int | str:
    """Return the position or name of the argument that an observed site has its value from."""
    value = data_of(site)
    places = _places(args, kwargs)
    same = [place for place, a in places.items() if a is value]
    same = same or [place for place, a in places.items() if _equal(a, value)]
    if len(same) == 1:
        return same[0]
    cause = f"arguments {same} are all equal to it" if same else "no argument is equal to it"
    raise ValueError(
        f"Where the data of site '{site['name']}' come from is not clear: {cause}. {_REMEDY}"
    )


def _places(args: tuple, kwargs: dict[str, Any]) -> dict[int | str, Any]:
    places: dict[int | str, Any] = dict(enumerate(args))
    places.update(kwargs)
    return places


def _equal(argument: Any, value: Any) -> bool:
    """Whether an argument has the observed values, in their order."""
    if not isinstance(argument, Tensor) or not isinstance(value, Tensor):
        return False
    if argument.numel() != value.numel() or argument.device != value.device:
        return False
    return torch.equal(argument.flatten().to(value.dtype), value.flatten())


def _shaped(site: Site, argument: Any, place: int | str) -> Tensor:
    drawn = site["value"]
    if not isinstance(argument, Tensor):
        return drawn
    if argument.numel() != drawn.numel():
        raise ValueError(
            f"The data simulated at site '{site['name']}' have shape {tuple(drawn.shape)}, and "
            f"argument {place!r} has {tuple(argument.shape)}. {_REMEDY}"
        )
    return drawn.reshape(argument.shape).to(argument.dtype)


def _check_same(simulated: poutine.Trace, again: poutine.Trace) -> None:
    """Raise where the model on simulated data is not the one that they were simulated from."""
    expected = {site["name"]: site for site in sites(simulated)}
    found = {site["name"]: site for site in sites(again)}
    for name in expected.keys() ^ found.keys():
        raise ValueError(
            f"Site '{name}' is there with the given data or with the simulated ones, not with "
            "both: the model's sites must not depend on its data."
        )
    for name, site in expected.items():
        if not _close(found[name]["value"], site["value"]):
            raise ValueError(
                f"The model does not observe at site '{name}' what was simulated there, although "
                f"its arguments were replaced. {_REMEDY}"
            )
        if not _close(*(log_prob_of(s, s["fn"]) for s in (found[name], site))):
            raise ValueError(
                f"The distribution of site '{name}' is another one for the simulated data than "
                "for the given data: the model has its data as inputs, too, or is random outside "
                "its sites. Pass what it conditions on as another argument, and call .eval() "
                "where there is dropout or batch norm."
            )


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return one.numel() == other.numel() and _close(one.flatten(), other.flatten())
    return torch.allclose(one.double(), other.double(), 1e-4, 1e-5, equal_nan=True)
