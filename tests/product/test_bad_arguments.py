"""Bad guides, networks, counts and files: an error that says what to do.

`CALLS` is the table. Programs that do not fit together are `tests.models.REFUSALS`.
"""

import inspect
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
)
from torch import Tensor

from pyro_recursive import (
    IWAE_ELBO,
    AmortizedGuide,
    ExemplarPrior,
    MixtureGuide,
    MultiSampleELBO,
    RecursiveMixture_ELBO,
    SemiAmortizedGuide,
    VampPrior,
    evaluation,
    fit,
    log_marginal,
)
from pyro_recursive.bounds.mixture_objectives import Clamped, Relbo
from pyro_recursive.evaluation import arviz
from pyro_recursive.evaluation.search import Search
from pyro_recursive.evaluation.snr import SNRSweep
from pyro_recursive.mapa import FreeCodes, recover_prior
from pyro_recursive.mapa.kernels import Gamma, Poisson
from pyro_recursive.mapa.table import Table, TableError
from pyro_recursive.training import CheckpointError
from tests import models
from tests.models import data, hierarchy, local, local_guide, subsampled
from tests.models.guides import Encoder, quiet

X = torch.zeros(3)


def encoded(n: int = 2, model: Callable = local, **options: Any) -> AmortizedGuide:
    return AmortizedGuide(model, Encoder(1, n), **options)


def in_a_dict(x: Tensor) -> dict[str, Tensor]:
    return {"x": x}


def mixture(*components: Callable, model: Callable = local, **options: Any) -> MixtureGuide:
    return MixtureGuide(model, list(components), **options)


CALLS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "no samples": (lambda x: IWAE_ELBO(0), ValueError, "num_particles"),
    "option of a loss": (
        lambda x: IWAE_ELBO(8, estimater="dreg"),
        TypeError,
        r"^IWAE_ELBO got an unknown option 'estimater'. Did you mean 'estimator'\?",
    ),
    "option of any bound": (
        lambda x: MultiSampleELBO(num_sample=8),
        TypeError,
        "^MultiSampleELBO got an unknown option 'num_sample'",
    ),
    "option of a loss of mixtures": (
        lambda x: RecursiveMixture_ELBO(holdouts=3),
        TypeError,
        r"^RecursiveMixture_ELBO got .*'holdouts'. Did you mean 'holdout'\?",
    ),
    "no samples of the evidence": (
        lambda x: log_marginal(local, local_guide, x, num_particles=0),
        ValueError,
        "num_particles",
    ),
    "encoder of another size": (
        lambda x: encoded(3)(x),
        ValueError,
        r"\(4, 3\).*\(4, 2\).*inputs=",
    ),
    "linear weights of a vector": (
        lambda x: mixture(encoded(), encoded())(x),
        ValueError,
        "weights='linear' needs",
    ),
    "linear weights of a dict": (
        lambda x: mixture(encoded(inputs=in_a_dict), encoded(), weights="linear")(x),
        ValueError,
        "weights='linear' needs",
    ),
    "holdout without a tuple": (
        lambda x: RecursiveMixture_ELBO(holdout=x),
        TypeError,
        r"Use \(tensor,\)",
    ),
    "joint loss of any guide": (
        lambda x: RecursiveMixture_ELBO(joint=IWAE_ELBO(4)),
        TypeError,
        "joint must be Stratified_ELBO, MISELBO or SIWAE_ELBO, got IWAE_ELBO",
    ),
    "objective turned round": (
        lambda x: RecursiveMixture_ELBO(objective=Clamped(1.0, strength=-1.0)),
        ValueError,
        "must be positive",
    ),
    "penalised entropy": (lambda x: Relbo(0.0), ValueError, "must be positive"),
    "negative direct term": (
        lambda x: SemiAmortizedGuide(local, encoded(), direct=-1.0),
        ValueError,
        "direct must be at least 0",
    ),
    "search without steps": (lambda x: Search(lr=0.0), ValueError, "lr and tolerance"),
    "codes without weight": (
        lambda x: FreeCodes(torch.ones(2, 1), weights=torch.zeros(2)),
        ValueError,
        "not all 0",
    ),
    "shape of zero": (lambda x: Poisson(shape=0.0), ValueError, "shape must be positive"),
    "negative concentration": (lambda x: Gamma(-0.5), ValueError, "concentration must be"),
    "copula to train": (
        lambda x: recover_prior(x[:, None], kind="copula", trainable=True),
        ValueError,
        "nothing to train",
    ),
    "negative share": (
        lambda x: recover_prior(x[:, None], held_out=-0.5),
        ValueError,
        "held_out must lie in",
    ),
    "empty bounds": (
        lambda x: VampPrior(Encoder(1, 2), x[:, None], bounds=(0.5, 0.5)),
        ValueError,
        "out of",
    ),
    "values for indices": (
        lambda x: ExemplarPrior(Encoder(1, 2), x[:, None])(leave_out=x),
        TypeError,
        "leave_out must be indices",
    ),
    "one exemplar at a time": (
        lambda x: ExemplarPrior(Encoder(1, 2), x[:, None], num_exemplars=1)(torch.zeros(1).long()),
        ValueError,
        "2 exemplars",
    ),
    "law in another size": (
        lambda x: SNRSweep((1,), (1, 2), {}, {}, {}).slope("guide", over="k"),
        ValueError,
        "over must be",
    ),
    "unknown weights": (
        lambda x: MixtureGuide(local, 2, weights="best"),
        ValueError,
        "weights must be one of",
    ),
    "unknown family": (
        lambda x: AmortizedGuide(local, family="banana"),
        ValueError,
        r"family must be one of",
    ),
    "unknown plate": (
        lambda x: AmortizedGuide(local, plate="rows")(x),
        ValueError,
        r"No latent site is inside .*'rows'.*'data'",
    ),
    "component without density": (
        lambda x: mixture(AutoDelta(local), AutoDelta(local))(x),
        NotImplementedError,
        "AutoDelta.* site 'z'.*AmortizedGuide",
    ),
    "component of joint density": (
        lambda x: mixture(
            AutoDiagonalNormal(hierarchy),
            encoded(model=hierarchy),
            model=hierarchy,
            weights="shared",
        )(x),
        ValueError,
        "AutoDiagonalNormal has one joint density, .* each row of plate 'data'. Use AutoNormal",
    ),
    "component of joint density, by name": (
        lambda x: mixture(AutoMultivariateNormal(local), encoded())(x),
        ValueError,
        "AutoMultivariateNormal has one joint density, .* each row of plate 'data'. Use AutoNormal",
    ),
    "component of joint density, by plate": (
        lambda x: mixture(AutoIAFNormal(local), AmortizedGuide(local), plate="data")(x),
        ValueError,
        r"AutoIAFNormal has one joint density, .* each row of plate 'data'. Leave out plate=\.",
    ),
    "component of other latents": (
        lambda x: mixture(AutoDiagonalNormal(local), AmortizedGuide(hierarchy), model=hierarchy)(x),
        ValueError,
        "one joint density over .*, not .*. Make it of the mixture's model",
    ),
    "a given minibatch": (
        lambda x: AmortizedGuide(subsampled, plate="data")(x, torch.tensor([0, 2])),
        ValueError,
        r"create_plates=",
    ),
    "a mixture that cannot grow": (
        lambda x: RecursiveMixture_ELBO(2).loss_and_grads(local, MixtureGuide(local, 2), x),
        TypeError,
        "needs a RecursiveMixtureGuide",
    ),
}


# Of every function of the evaluation with an argument that has a type: other arguments, and what
# it needs.
SWAPPED: dict[str, list[tuple[tuple, str]]] = {
    **{
        name: [((local, X), "guide, and needs a callable"), ((X, X), "model, and needs a callable")]
        for name in (
            *("log_marginal", "importance_weights", "posterior_draws", "rate_of", "saliency"),
            "to_arviz",
        )
    },
    **{
        name: [((local, local_guide), "got function as draws, and needs Draws")]
        for name in ("predictive_draws", "log_likelihoods")
    },
    "prior_draws": [((X,), "got Tensor as model")],
    "predict": [((local, X), "got Tensor as guide, and needs a callable or Draws")],
    "gaps": [((local, local_guide), "got function as guide, and needs a guide like Amortized")],
    "active_units": [((X,), "got Tensor as guide")],
    "mutual_information": [((None, X), "got NoneType as guide")],
    "mixture_diversity": [((local,), "needs a MixtureGuide")],
    "calibration": [((local, X), "got Tensor as guide")],
    "calibration_by_fits": [((local, X), "got Tensor as fit_guide")],
    "gradient_snr": [((local, local_guide, X), "got Tensor as loss, and needs Loss")],
    "gradient_snr_sweep": [((local, local_guide, X), "got Tensor as make_loss")],
    "evaluate_in_parallel": [
        ((X,), "as function"),
        ((len,), "rows"),
        ((len, 3), "got int as rows"),
    ],
    "mcmc_to_arviz": [((local, local), "got function as mcmc, and needs Chains")],
    "loo": [((local,), "got function as data, and needs InferenceData|DataTree")],
    "plot_gaps": [((X,), "needs Gaps or Mapping")],
    "plot_gradient_snr": [((X,), "needs SNRSweep")],
    "plot_history": [((X,), "needs Losses")],
    "plot_pareto_k": [(([0.1],), "needs Tensor or ImportanceWeights")],
    **{
        name: [(([1.0],), "got list as .*, and needs Tensor")]
        for name in ("psis", "effective_sample_size", "signal_to_noise", "plot_saliency")
    },
    **{
        name: [(([1], 3), "got list as ranks, and needs Tensor")]
        for name in ("plot_ranks", "plot_ecdf_difference")
    },
    "jensen_shannon": [((local, X), "got function as log_densities, and needs Tensor")],
    "pareto_k_threshold": [(("a",), "not supported")],
}


@pytest.mark.parametrize("name", [*evaluation.__all__, *arviz.__all__])
def test_arguments_of_evaluation(name: str) -> None:
    function = getattr(arviz, name, getattr(evaluation, name, None))
    if not inspect.isfunction(function):
        assert name not in SWAPPED  # a class of results
        return
    for arguments, words in SWAPPED[name]:
        with pytest.raises(TypeError, match=words):
            function(*arguments)


@pytest.mark.parametrize("name", CALLS)
def test_refused_with_a_remedy(name: str) -> None:
    call, error, words = CALLS[name]
    with pytest.raises(error, match=words), quiet():
        call(data())


def test_rows_may_have_bounds_of_their_own() -> None:
    def model(x: Tensor, high: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.zeros(()), high))
            models.observe(z, x)

    high = torch.tensor([0.01, 1.0, 50.0, 0.2])
    z = encoded(model=model)(data(), high)["z"]
    assert ((z > 0) & (z < high)).all()


def test_indices_from_the_left_and_from_the_right() -> None:
    """Both give what runs one by one give: under a plate of samples, or under `torch.vmap`."""
    group = torch.tensor([0, 8, 3, 8])

    def program(index: Callable[[Tensor], Tensor]) -> Callable:
        def model(x: Tensor) -> None:
            with pyro.plate("groups", 9):
                b = models.normal("b", 0.0, 1.0)
            with pyro.plate("data", len(x)):
                models.observe(index(b), x)

        return model

    def guide(x: Tensor) -> None:
        with pyro.plate("groups", 9):
            pyro.sample("b", dist.Delta(torch.linspace(-1, 1, 9)))

    left, right = program(lambda b: b[group]), program(lambda b: b[..., group])
    one_by_one = IWAE_ELBO(8, vectorize_particles=False).loss(left, guide, data())
    for model in (left, right):
        assert IWAE_ELBO(8).loss(model, guide, data()) == pytest.approx(one_by_one)


# Files; damaged ones, and those of data sets, are with their own tests.


class Payload:
    """What a pickle may do when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


DISGUISES: dict[str, Callable[[Any, Path], Any]] = {
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "torch": torch.save,
    "old torch": partial(torch.save, _use_new_zipfile_serialization=False),
}


def resume(path: Path) -> None:
    options = {"epochs": 1, "checkpoint": path, "resume": True, "progress": False}
    fit(local, encoded(), data(), loss=IWAE_ELBO(2), **options)


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize(("read", "error"), [(resume, CheckpointError), (Table.load, TableError)])
def test_no_file_runs_code(
    read: Callable, error: type[Exception], disguise: str, tmp_path: Path
) -> None:
    """Not even where all else is as it must be; the payload itself works."""
    path, marker = tmp_path / "file.pt", tmp_path / "marker"
    for content in (Payload(marker), {"format": 1, "index": Payload(marker)}):
        DISGUISES[disguise](content, path)
        with pytest.raises(error, match=r"file\.pt"):
            read(path)
        assert not marker.exists()
        pickle.loads(pickle.dumps(content))
        assert marker.exists()
        marker.unlink()
