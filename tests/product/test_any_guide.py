"""Every guide of the package on every kind of model: what works, and what is refused in words.

`refusal` says what must be refused; everything else must work: the sites of a trace, the density at
the guide's own and at foreign values, and every loss with a gradient for every parameter.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO

from pyro_recursive import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MISELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    SIWAE_ELBO,
    SemiAmortizedGuide,
    Stratified_ELBO,
)
from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.tracing.handlers import FlatPriors
from pyro_recursive.tracing.sites import subsample_sites
from pyro_recursive.tracing.supports import coordinates, is_circular
from tests.models import Row
from tests.models.guides import (
    EXPLICIT,
    KINDS,
    MODELS,
    MORE,
    Kind,
    Setting,
    density_at,
    estimators_of,
    gradients_of,
    latents_in,
    made,
    members_of,
    quiet,
    setting,
)

DISCRETE = {row.name for row in MODELS if row.sites == "discrete"}
LOOPS = {row.name for row in MODELS if "sequential" in row.name or "loop" in row.name}
UNSIZED = {"unsized", "exact_unsized", "level"}
MASKED = {"mask_handler", "mask_false", "obs_mask", "unequal_scales", "ragged"}
MASKED_IN_PARTS = {"obs_mask", "ragged"}  # of a row, without an influence on anything
EVERY_LOSS = {"explicit_subsample", "hierarchy"}
# In the quick loop every model meets some kinds, and some models every kind.
QUICK_KINDS = {"encoder", "mixture_encoders", "recursive", "refined"}
QUICK_MODELS = {"supports", "nested"}
ALIKE = {  # as others are, but for what their own guides make of them: the quick kinds will do
    *("annealed_mixed", "masked_discrete", "masked_mixed", "mixed_global", "exact_no_plate"),
    *("exact_subsample", "exact_masked", "exact_grid_reversed", "exact_loop_of_plate"),
    *("size_one", "exact_unsized", "level"),
}

OF_VARIANTS = {*QUICK_MODELS, *EVERY_LOSS, *MASKED, "subsample_size", "events", "unsized", "series"}
# Models whose densities or transforms no other model has: gradients go through them twice.
DENSITIES = {"constrained", "factor", "reparam", "mixture_prior", "improper", "angles", "bounds"}
VARIANTS = {  # of other kinds, by what does not depend on the model: some models will do
    **dict.fromkeys(("full", "low_rank", "encoder_full"), OF_VARIANTS),  # families
    **dict.fromkeys(("recursive_table", "recursive_conditional"), OF_VARIANTS),  # growth
    **dict.fromkeys(("refined_by_network", "whitened"), OF_VARIANTS),
    "refined_second_order": OF_VARIANTS | DENSITIES,
}

Refused = tuple[type[Exception], str]


def refusal(row: Row, kind: Kind, by_row: bool) -> Refused | None:
    """Return the error with which a guide must refuse a model when it first sees it."""
    is_auto, is_hand = kind.auto in ("sites", "joint"), kind.auto == "hand"
    is_subsampled = row.name in {"subsample_size", *EXPLICIT}
    cases = (
        (row.name == "no_latents", ValueError, "found no latent sites"),
        (kind.rows == "table" and not by_row, ValueError, "No latent site is inside"),
        (row.name in DISCRETE, NotImplementedError, r"Latent site 'k\w*' is discrete"),
        (row.name == "sequential_subsample", ValueError, r"is a loop over a minibatch"),
        (kind.rows == "encoder" and not by_row, ValueError, "rows to encode"),
        (kind.rows == "joint" and is_subsampled, ValueError, r"is subsampled \(2 of 4\)"),
        (is_auto and row.name in LOOPS, NotImplementedError, "not support sequential pyro.plate"),
        (is_auto and row.name in UNSIZED, ValueError, "Plate 'data' has no size, which Auto"),
        (is_auto and row.name == "mixture_prior", NotImplementedError, "Cannot transform Mixture"),
        (is_auto and row.name == "improper", NotImplementedError, "does not support sampling"),
        (
            kind.name == "whitened" and row.name in MASKED_IN_PARTS,
            NotImplementedError,
            "whitened coordinates mix all latents",
        ),
        (is_hand and row.name == "factor_in_guide", NotImplementedError, "site 'u'"),
        (is_hand and row.name in MASKED, NotImplementedError, r"masks site"),
    )
    return next(((error, words) for holds, error, words in cases if holds), None)


def stratified_refusal(guide: LatentGuide) -> Refused | None:
    if isinstance(guide, SemiAmortizedGuide):
        return TypeError, "needs a mixture guide"
    return (NotImplementedError, "global latents") if len(guide.groups) > 1 else None


# The sites of a trace, and the density at any values.


def check_trace(s: Setting, guide: LatentGuide, kind: Kind) -> None:
    guide.eval()  # a table of refined rows moves in training
    trace = poutine.trace(guide).get_trace(*s.args)
    minibatch = subsample_sites(trace)
    model = FlatPriors()(s.model)
    prior = poutine.trace(poutine.replay(model, trace=minibatch)).get_trace(*s.args)
    expected, found = latents_in(prior), latents_in(trace)
    auxiliary = {name for name, site in found.items() if site["infer"].get("is_auxiliary")}
    assert found.keys() - auxiliary == expected.keys()
    assert all(name.endswith("_component") for name in auxiliary)
    members = len(members_of(guide)) if kind.mixture else 1
    assert len(auxiliary) == (len(guide.groups) if members > 1 else 0)
    for name, site in expected.items():
        assert found[name]["value"].shape == site["value"].shape
    for source in (found, expected):  # the guide's own values, and foreign ones
        values = {name: source[name]["value"].detach().clone() for name in expected}
        check_density(s, guide, trace, values)
    guide.train()


def check_density(s: Setting, guide: LatentGuide, trace: poutine.Trace, values: dict) -> None:
    """Replay a guide on values, and compare with its posterior under the supports' transforms."""
    replayed = trace.copy()
    for name, value in values.items():
        replayed.nodes[name] = {**replayed.nodes[name], "value": value}
    again = poutine.trace(poutine.replay(guide, trace=replayed)).get_trace(*s.args)
    model = poutine.trace(poutine.replay(s.model, trace=replayed)).get_trace(*s.args)
    # Without the scale of minibatches.
    each = [site["fn"].log_prob(site["value"]).sum() for site in latents_in(again).values()]
    expected = poutine.replay(density_at, trace=replayed)(guide, s.args, values).sum()
    for name, value in values.items():
        fn: Any = model.nodes[name]["fn"]
        assert fn.support.check(value).all()
        transform = coordinates(fn, is_circular(fn))
        expected = expected - transform.log_abs_det_jacobian(transform.inv(value), value).sum()
    assert expected.isfinite()
    torch.testing.assert_close(sum(each), expected, rtol=1e-6, atol=1e-8)


# Losses.


def losses_of(kind: Kind, guide: LatentGuide, *, every: bool) -> Iterator[Any]:
    names = estimators_of(kind, guide)
    yield CIWAE_ELBO(10, estimator=names[0])
    if every:
        for estimator in names:
            yield IWAE_ELBO(10, estimator=estimator)
        yield PIWAE_ELBO(2, 10, estimator=names[1])
        yield MIWAE_ELBO(1, 10, estimator=names[0], vectorize_particles=False)
        yield Trace_ELBO(num_particles=6, vectorize_particles=True, max_plate_nesting=4)
        yield Trace_ELBO()
        yield TraceGraph_ELBO()
        yield RenyiELBO(alpha=0.5, num_particles=3)


def stratified_losses(*, every: bool) -> Iterator[Any]:
    yield Stratified_ELBO(2, estimator="stl")
    if every:
        yield SIWAE_ELBO(2)
        yield Stratified_ELBO(2)
        yield MISELBO(2)


def check_gradients(loss: Any, s: Setting, guide: LatentGuide) -> None:
    """No parameter of a member of the mixture is without a gradient."""
    found = gradients_of(loss, s, guide)
    members = getattr(guide, "members", range(9))
    outside = tuple(f"components.{m}." for m in range(9) if m not in members)
    for name, gradient in found.items():
        if name.startswith(outside) or (len(members) == 1 and name.startswith("weights")):
            continue
        if name == "guide.free_local_unconstrained":
            assert gradient is None  # a table that keeps what its rows become
            continue
        if "scale_tril" in name and gradient is not None and gradient.numel() == 1:
            continue  # the unit diagonal alone
        assert gradient is not None and gradient.isfinite().all(), (type(loss), name)
        assert gradient.ne(0).any(), (type(loss).__name__, name)


def check_loss(loss: Any, s: Setting, guide: LatentGuide, refused: Refused | None) -> None:
    if refused is None:
        check_gradients(loss, s, guide)
        return
    with pytest.raises(refused[0], match=refused[1]), quiet():
        loss.loss_and_grads(s.model, guide, *s.args)


def in_turn(row: Row, kind: Kind) -> Any:
    quick = kind.name in QUICK_KINDS or row.name in QUICK_MODELS
    if row.name in ALIKE | EVERY_LOSS:
        quick = kind.name == "encoder"
    marks = () if quick else pytest.mark.slow
    return pytest.param(row, kind, marks=marks, id=f"{row.name}-{kind.name}")


NONE_BY_HAND = {"constrained", "auto_normal_global", "reparam", "events", "nested", "crossed"}
NONE_BY_HAND |= {row.name for row in MORE}
COMBINATIONS = [
    in_turn(row, kind)
    for row in MODELS
    for kind in KINDS
    if kind.auto != "hand" or row.name not in NONE_BY_HAND
    if kind.name in QUICK_KINDS or row.name not in ALIKE
    if row.name in VARIANTS.get(kind.name, {row.name})
]


@pytest.mark.quick(28)
@pytest.mark.parametrize(("row", "kind"), COMBINATIONS)
def test_works_or_is_refused(row: Row, kind: Kind) -> None:
    refused = refusal(row, kind, setting(row).plate is not None)
    if refused:
        with pytest.raises(refused[0], match=refused[1]):
            made(row, kind)
        return
    s, guide = made(row, kind)
    if row.name in MASKED_IN_PARTS and ("flow" in kind.name or kind.name == "mixture_unlike"):
        with pytest.raises(NotImplementedError, match="Some latents of a row are masked"):
            check_trace(s, guide, kind)
        return
    check_trace(s, guide, kind)
    every = row.name in EVERY_LOSS
    for loss in losses_of(kind, guide, every=every):
        of_loss = None
        # Where the guide's steps depend on the model's parameters, differentiably.
        shares = row.name == "explicit_subsample" and kind.name == "refined_second_order"
        if shares and isinstance(loss, PIWAE_ELBO):
            of_loss = ValueError, "Parameter 'mu' belongs to model and guide"
        check_loss(loss, s, guide, of_loss)
    if kind.mixture:
        for loss in stratified_losses(every=every):
            check_loss(loss, s, guide, stratified_refusal(guide))
