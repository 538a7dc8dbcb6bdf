"""Every guide of the package on every kind of model: what works, and what is refused in words.

`refusal` says what must be refused; everything else must work: the sites of a trace, the density at
the guide's own and at foreign values, and every loss with a gradient for every parameter.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor
from torch.distributions import biject_to

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
from pyro_recursive.tracing.sites import subsample_sites
from tests.models import Row
from tests.models.guides import (
    EXPLICIT,
    KINDS,
    MODELS,
    MORE,
    PLATES,
    Kind,
    Setting,
    estimators_of,
    gradients_of,
    latents_in,
    made,
    members_of,
    quiet,
)

SUBSAMPLED = {"subsample_size", "annealed_subsample", *EXPLICIT}
DISCRETE = {row.name for row in MODELS if row.sites == "discrete"}
LOOPS = {row.name for row in MODELS if "sequential" in row.name or "loop" in row.name}
MASKED = {"mask_handler", "mask_method", "mask_false", "obs_mask", "unequal_scales"}


# What must be refused.

Refused = tuple[type[Exception], str]


def refusal(row: Row, kind: Kind) -> Refused | None:
    """Return the error with which a guide must refuse a model when it first sees it."""
    if row.name == "no_latents":
        return ValueError, "found no latent sites.*an empty function"
    by_row = PLATES.get(row.name, "data") is not None
    if kind.rows == "table" and not by_row:
        return ValueError, "No latent site is inside a vectorised plate 'data'"
    if row.name in DISCRETE:
        return NotImplementedError, r"Latent site 'k\w*' is discrete.*enumerate.*AutoGuideList"
    if row.name == "sequential_subsample":
        return ValueError, r"Plate 'data' of latent site 'z\d' is a loop over a minibatch"
    if kind.rows == "encoder" and not by_row:
        return ValueError, "has an encoder, and there are no rows to encode.*plate="
    if kind.rows == "joint" and row.name in SUBSAMPLED:
        return ValueError, r"Plate 'data' of latent site 'z' is subsampled \(2 of 4\).*plate="
    return _refusal_of_others(row, kind)


def _refusal_of_others(row: Row, kind: Kind) -> Refused | None:
    """The same for what the components of a mixture cannot do."""
    if kind.auto in ("sites", "joint") and row.name in LOOPS:
        return NotImplementedError, "does not support sequential pyro.plate"
    if kind.auto in ("sites", "joint") and row.name == "mixture_prior":
        return NotImplementedError, "Cannot transform MixtureSameFamilyConstraint"
    if kind.auto != "hand":
        return None
    if row.name == "factor_in_guide":
        return NotImplementedError, "factor_guide, does not sample site '.*' of the model itself"
    if row.name in MASKED:
        return NotImplementedError, r"masks site '\w+'.*Leave out the mask"
    return None


def loss_refusal(row: Row) -> Refused | None:
    """Return the error of this package's losses: no guide of the package masks a latent."""
    if row.name in MASKED:
        return ValueError, r"Model site '\w+' is masked and the guide's is not.*AutoGuideList"
    return None


def stratified_refusal(row: Row, guide: LatentGuide) -> Refused | None:
    if isinstance(guide, SemiAmortizedGuide):
        return TypeError, "needs a mixture guide .*got SemiAmortizedGuide"
    if loss_refusal(row):
        return loss_refusal(row)
    if len(guide.groups) > 1:
        return NotImplementedError, "one mixture over the global latents.*leave out plate="
    return None


def applies(row: Row, kind: Kind) -> bool:
    """Leave out a guide by hand where the row has none of the kind."""
    if kind.auto == "hand":
        unfit = row.name in {"constrained", "auto_normal_global", "reparam"}
        return not unfit and row not in MORE
    return True


COMBINATIONS = [(row, kind) for row in MODELS for kind in KINDS if applies(row, kind)]
# In the quick loop every model meets some kinds, and some models every kind.
QUICK_KINDS = {"encoder", "mixture_encoders", "recursive", "refined"}
QUICK_MODELS = {"supports", "nested"}
ALIKE = {  # as others are, but for what their own guides make of them: some kinds will do
    *("annealed_subsample", "annealed_mixed", "masked_discrete", "masked_mixed", "mixed_global"),
    *("exact_no_plate", "exact_far_dim", "exact_subsample", "exact_masked", "exact_loop"),
    *("exact_grid", "exact_grid_reversed", "exact_loop_of_plate", "sequential_twice", "size_one"),
}
EVERY_LOSS = {"explicit_subsample", "hierarchy"}
# Where the guide's steps depend on the model's parameters, differentiably.
SHARED = {("explicit_subsample", "refined_second_order")}


def is_needed(row: Row, kind: Kind) -> bool:
    return row.name not in ALIKE or kind.name in QUICK_KINDS


def is_quick(row: Row, kind: Kind) -> bool:
    if row.name in ALIKE | EVERY_LOSS:
        return kind.name == "encoder"
    return kind.name in QUICK_KINDS or row.name in QUICK_MODELS


def over(chosen: Iterable[tuple[Row, Kind]]) -> Any:
    return pytest.mark.parametrize(
        ("row", "kind"),
        [
            pytest.param(
                row,
                kind,
                marks=() if is_quick(row, kind) else pytest.mark.slow,
                id=f"{row.name}-{kind.name}",
            )
            for row, kind in chosen
        ],
    )


# The sites of a trace, and the density at any values.


def check_trace(s: Setting, guide: LatentGuide, kind: Kind) -> None:
    guide.eval()  # a table of refined rows moves in training
    trace = poutine.trace(guide).get_trace(*s.args)
    minibatch = subsample_sites(trace)
    prior = poutine.trace(poutine.replay(s.model, trace=minibatch)).get_trace(*s.args)
    expected, found = latents_in(prior), latents_in(trace)
    auxiliary = {name for name, site in found.items() if site["infer"].get("is_auxiliary")}
    assert found.keys() - auxiliary == expected.keys()
    assert all(name.endswith("_component") for name in auxiliary)
    members = len(members_of(guide)) if kind.mixture else 1
    assert len(auxiliary) == (len(guide.groups) if members > 1 else 0)
    for name, site in expected.items():
        assert found[name]["value"].shape == site["value"].shape
        assert site["fn"].support.check(found[name]["value"]).all()
    for source in (found, expected):  # the guide's own values, and foreign ones
        values = {name: source[name]["value"].detach().clone() for name in expected}
        check_density(s, guide, trace, prior, values)
    guide.train()


def check_density(
    s: Setting, guide: LatentGuide, trace: poutine.Trace, prior: poutine.Trace, values: dict
) -> None:
    """Replay a guide on values, and compare with its posterior under the supports' transforms."""
    replayed = trace.copy()
    for name, value in values.items():
        replayed.nodes[name] = {**replayed.nodes[name], "value": value}
    again = poutine.trace(poutine.replay(guide, trace=replayed)).get_trace(*s.args)
    # Without the scale of minibatches.
    each = [site["fn"].log_prob(site["value"]).sum() for site in latents_in(again).values()]

    def by_hand() -> Tensor:
        call = guide.new_call(s.args, {})
        call.given.update(values)
        packed = [(group, group.pack(values)) for group in guide.groups]
        return sum(guide.posterior(group, call).log_prob(u).sum() for group, u in packed)

    expected = poutine.replay(by_hand, trace=replayed)()
    for name, value in values.items():
        transform = biject_to(_support(prior.nodes[name]["fn"].support))
        expected = expected - transform.log_abs_det_jacobian(transform.inv(value), value).sum()
    assert expected.isfinite()
    torch.testing.assert_close(sum(each), expected, rtol=1e-6, atol=1e-8)


def _support(support: Any) -> Any:
    return getattr(support, "base_constraint", support) if "Mixture" in repr(support) else support


# Losses.


def multi_sample_losses(kind: Kind, guide: LatentGuide) -> Iterator[Any]:
    names = estimators_of(kind, guide)
    for i, estimator in enumerate(names):
        yield IWAE_ELBO(10, estimator=estimator)
        yield (CIWAE_ELBO(10, estimator=estimator), PIWAE_ELBO(2, 10, estimator=estimator))[i % 2]
    yield MIWAE_ELBO(1, 10, estimator=names[0], vectorize_particles=False)


def pyro_losses() -> Iterator[Any]:
    yield Trace_ELBO(num_particles=6, vectorize_particles=True, max_plate_nesting=4)
    yield Trace_ELBO()
    yield TraceGraph_ELBO()
    yield RenyiELBO(alpha=0.5, num_particles=3)


def check_gradients(loss: Any, s: Setting, guide: LatentGuide) -> None:
    """No parameter of a member of the mixture is without a gradient."""
    found = gradients_of(loss, s, guide)
    outside = [f"components.{m}." for m in range(9) if m not in getattr(guide, "members", range(9))]
    single = len(getattr(guide, "members", ())) == 1
    for name, gradient in found.items():
        if any(map(name.startswith, outside)) or (single and name.startswith("weights")):
            continue
        if name == "guide.free_local_unconstrained":
            assert gradient is None  # a table that keeps what its rows become
            continue
        if "scale_tril" in name and gradient is not None and gradient.numel() == 1:
            continue  # the unit diagonal alone
        assert gradient is not None and gradient.isfinite().all(), (type(loss), name)
        assert gradient.ne(0).any(), (type(loss).__name__, name)


def check_losses(s: Setting, guide: LatentGuide, kind: Kind, *, every: bool) -> None:
    refused = loss_refusal(s.row)
    if refused:
        with pytest.raises(refused[0], match=refused[1]):
            IWAE_ELBO(3, estimator=estimators_of(kind, guide)[0]).loss(s.model, guide, *s.args)
    else:
        losses = list(multi_sample_losses(kind, guide))
        for loss in losses if every else losses[1:2]:
            if isinstance(loss, PIWAE_ELBO) and (s.row.name, kind.name) in SHARED:
                with pytest.raises(ValueError, match="Parameter 'mu' belongs to model and guide"):
                    loss.loss_and_grads(s.model, guide, *s.args)
            else:
                check_gradients(loss, s, guide)
    if every:
        for loss in pyro_losses():
            check_gradients(loss, s, guide)
    if kind.mixture:
        check_stratified(s, guide, every=every)


def stratified_losses() -> Iterator[Any]:
    yield Stratified_ELBO(2, estimator="stl")
    yield SIWAE_ELBO(2)
    yield Stratified_ELBO(2)
    yield MISELBO(2)


def check_stratified(s: Setting, guide: LatentGuide, *, every: bool) -> None:
    refused = stratified_refusal(s.row, guide)
    for loss in list(stratified_losses())[: None if every else 1]:
        if refused:
            with pytest.raises(refused[0], match=refused[1]), quiet():
                loss.loss(s.model, guide, *s.args)
        else:
            check_gradients(loss, s, guide)


def check(row: Row, kind: Kind, *, every: bool = True) -> None:
    refused = refusal(row, kind)
    if refused:
        with pytest.raises(refused[0], match=refused[1]):
            made(row, kind)
        return
    s, guide = made(row, kind)
    check_trace(s, guide, kind)
    check_losses(s, guide, kind, every=every)


@over(row_and_kind for row_and_kind in COMBINATIONS if is_needed(*row_and_kind))
def test_works_or_is_refused(row: Row, kind: Kind) -> None:
    check(row, kind, every=row.name in EVERY_LOSS)
