"""A guide's rows: the plate that has them, and whether each has a density of its own."""

from collections.abc import Sequence
from typing import Any

from pyro import poutine

from pyro_recursive.tracing.handlers import ComponentIndex
from pyro_recursive.tracing.sites import Site, independent_plates_of, is_delta, plates_of, sites

__all__ = ["check_density", "latent", "no_density", "rows_plate"]


def latent(trace: poutine.Trace) -> list[Site]:
    """Return the latent sites of a trace, auxiliary ones included."""
    return [site for site in sites(trace) if not site["is_observed"]]


def rows_plate(found: Sequence[Site], plate: str | None = None) -> Any:
    """Return the frame of the rows' plate, whose entries have densities of their own.

    :param found: the latent sites of a guide
    :param plate: its name; None takes the one around all sites that are in any
    :raises ValueError: it is not there, not clear, or a loop; its entries have one joint density
    """
    if plate is None:
        plate = _shared_plate(found)
    inside = [site for site in found if plate in plates_of(site)]
    if not inside:
        known = sorted({name for site in found for name in plates_of(site)})
        raise ValueError(f"No latent site of the guide is in plate '{plate}'; there are {known}.")
    for site in inside:
        if plate not in independent_plates_of(site):
            raise ValueError(
                f"Guide site '{site['name']}' has one joint density over the entries of plate "
                f"'{plate}', and none for each. Give the guide an encoder, or plate='{plate}'."
            )
    frame = plates_of(inside[0])[plate]
    if not frame.vectorized:
        raise ValueError(
            f"Plate '{plate}' of guide site '{inside[0]['name']}' is a loop, and rows are compared "
            "all at once. Write it as `with pyro.plate(...)`, or name another plate with plate=."
        )
    return frame


def _shared_plate(found: Sequence[Site]) -> str:
    """Return the name of the one plate around all latents that are in any."""
    if not found:
        raise ValueError("The guide has no latent sites: nothing depends on the data.")
    plates = {site["name"]: set(plates_of(site)) for site in found if plates_of(site)}
    if not plates:
        raise ValueError(
            f"Guide site '{found[0]['name']}' is in no plate, nor is any other: there are no rows "
            "to compare. Sample the latents of the data inside the data's pyro.plate."
        )
    shared = set.intersection(*plates.values())
    own = shared.intersection(*(independent_plates_of(site) for site in found if plates_of(site)))
    candidates = own or shared
    if len(candidates) != 1:
        listed = ", ".join(f"'{name}' in {sorted(names)}" for name, names in plates.items())
        raise ValueError(
            f"Which plate has the rows is not clear from the guide's sites: {listed}. Name it with "
            "plate=."
        )
    return candidates.pop()


def check_density(local: Sequence[Site]) -> None:
    """Raise where the latents of the rows have no density that could be asked.

    :raises ValueError: all are computed, or some are sampled after an auxiliary one
    """
    sampled = [s for s in local if not is_delta(s) and not isinstance(s["fn"], ComponentIndex)]
    if not sampled:
        raise no_density(local[-1])
    auxiliary = [site for site in sampled if site["infer"].get("is_auxiliary")]
    # What is computed from an auxiliary draw has its density; what is sampled after it has not.
    if auxiliary and not any(is_delta(site) for site in local):
        raise ValueError(
            f"Guide site '{auxiliary[0]['name']}' is auxiliary: the density of the latents is an "
            "integral over it, which is unknown. A mixture has its density as a MixtureGuide, or "
            "as a distribution such as MixtureSameFamily."
        )


def no_density(site: Site) -> ValueError:
    """Return the error for a site whose value is no draw of its row."""
    return ValueError(
        f"Guide site '{site['name']}' is computed (a Delta), and not from draws of its row alone: "
        "a row's density at the value of another is unknown. Sample it from a distribution. "
        "AutoNormal and AmortizedGuide do; guides of points, and joint ones such as "
        "AutoDiagonalNormal, have no density for each row."
    )
