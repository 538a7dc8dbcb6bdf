"""Bad models, guides, networks, counts and files: an error that says what to do; nothing changes.

`GUIDES`, `NETWORKS`, `CALLABLES`, `COUNTS`, `FILES` and `EXTRAS` are the tables.
"""

import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor, nn

from pyro_recursive import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MISELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    SIWAE_ELBO,
    AmortizedGuide,
    ExemplarPrior,
    FlowGuide,
    MAPAGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    SemiAmortizedGuide,
    Stratified_ELBO,
    VampPrior,
    fit,
    gaps,
    log_marginal,
)
from pyro_recursive.datasets import image_files, load
from pyro_recursive.evaluation.plots import plot_pareto_k
from pyro_recursive.evaluation.search import Search
from pyro_recursive.guides.semi_amortized.updates import LearnedUpdate
from pyro_recursive.mapa import EncodedCodes, PseudoInputCodes
from pyro_recursive.mapa.kernels import Gaussian
from pyro_recursive.mapa.nearest import nearest
from pyro_recursive.mapa.table import Table, TableError
from pyro_recursive.training import Aggressive, CheckpointError
from tests.models.small import normal_rows as local

# --- Model and guide


ROWS = 4


def encoded(model: Callable) -> AmortizedGuide:
    return AmortizedGuide(model, nn.Linear(1, 2))


def features() -> Tensor:
    return torch.tensor([[0.3, -1.2], [0.8, 0.1], [-0.5, 0.9], [1.4, 0.4]])


def numbers() -> Tensor:
    return torch.tensor([0.5, -0.3, 1.1, 0.2])


def indexed(x: Tensor) -> None:
    """Its data follow the plate: the guide's plate would choose rows in silence."""
    with pyro.plate("data", len(x)) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def guide_of(size: int = ROWS, *, shape: tuple = (), event: int = 0, obs: Any = None, **plate: Any):
    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.2))
        with pyro.plate("data", size, **plate):
            pyro.sample("z", dist.Normal(loc.expand(shape), 1.0).to_event(event), obs=obs)

    return guide


def in_no_plate(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 1.0))


def one_event(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.2)).expand(ROWS)
    pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


def beside(obs: bool) -> Callable:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x if obs else None)

    return guide


def empty(x: Tensor) -> None:
    pyro.param("loc", torch.tensor(0.2))


SIZES = r"Plate 'data' has {} where it is met first and {} at site 'z'.*same size"
GUIDES: dict[str, tuple[Callable, Callable, str]] = {
    "misses a site": (local, empty, "Model site 'z' is latent and the guide does not sample it"),
    "has one more": (local, beside(obs=False), "Guide site 'x' is no latent site of the model"),
    "observes the latent": (local, guide_of(obs=torch.zeros(ROWS)),
                            "Guide site 'z' is observed.*as if it had been sampled.*Drop its obs="),
    "observes the data": (local, beside(obs=True), "Guide site 'x' is observed.*Drop its obs="),
    "smaller plate": (indexed, guide_of(3), SIZES.format("3 of 4 entries", "3 entries")),
    "plate of one": (local, guide_of(1), SIZES.format("1 of 4 entries", "1 entries")),
    "larger plate": (local, guide_of(40, subsample_size=4),
                     SIZES.format("4 entries", "4 of 40 entries")),
    "other dim": (local, guide_of(dim=-2), r"('z' has batch shape|disagree at site 'z')"),
    "no plate": (local, in_no_plate, r"disagree at site 'z'.*Site 'z' is in plates \['data'\] in "
                 r"the model and \[\] in the guide. Give model and guide the same plates"),
    "an event for a plate": (local, one_event, "disagree at site 'z'.*same plates"),
}  # fmt: skip


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("way", ["one pass", "loop", "third step", "log_marginal"])
def test_guides_that_do_not_fit(name: str, way: str) -> None:
    model, guide, message = GUIDES[name]
    x = numbers()

    def run(guide: Callable) -> Any:
        if way == "log_marginal":
            return log_marginal(model, guide, x, num_particles=4)
        loss = IWAE_ELBO(3, vectorize_particles=way != "loop")
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss)
        return [svi.step(x) for _ in range(2 if way == "third step" else 1)]

    run(guide_of())
    loc = pyro.param("loc").item()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        run(guide)
    assert pyro.param("loc").item() == loc


def test_a_scalar_in_a_plate_is_found_without_validation() -> None:
    """Sizes are compared in any case; they cost nothing."""
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="Plate 'data' has 3 of 4"):
        IWAE_ELBO(3).loss(indexed, guide_of(3), numbers())


# --- Networks: what is no instance of a module would be left out, or called as a constructor


def function(x: Tensor) -> Tensor:
    return x


MODULE = "{} must be a torch module, got {}"
NETWORKS: dict[str, Callable[[Any], Any]] = {
    "encoder": lambda e: AmortizedGuide(local, e),
    "encoder of a flow": lambda e: FlowGuide(local, encoder=e),
    "trunk": lambda e: MixtureGuide(local, 2, trunk=e),
    "weights": lambda e: MixtureGuide(local, 2, weights=e),
    "weights, recursive": lambda e: RecursiveMixtureGuide(local, 2, weights=e),
    "features": lambda e: LearnedUpdate(features=e),
    "network": lambda e: LearnedUpdate(network=e),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_a_module(name: str) -> None:
    argument, make = name.split(" ")[0].rstrip(","), NETWORKS[name]
    make(None)
    make(nn.Linear(1, 2))
    with pytest.raises(TypeError, match=f"{argument} must be an instance, got the class Linear"):
        make(nn.Linear)
    for other, got in ((function, "function.*forward"), (partial(function), "partial")):
        with pytest.raises(TypeError, match=MODULE.format(argument, got)):
            make(other)
    with pytest.raises((TypeError, ValueError), match=f"{argument} must be .*got"):
        make(3)


CALLABLES: dict[str, Callable[[Any], Any]] = {
    "codes": lambda e: MAPAGuide(local, e, features()),
    "kernel": lambda e: MAPAGuide(local, function, features(), kernel=e),
    "rest": lambda e: MAPAGuide(local, function, features(), rest=e),
    "encoder of a VampPrior": lambda e: VampPrior(e, features()),
    "encoder of an ExemplarPrior": lambda e: ExemplarPrior(e, features()),
    "encoder of codes": lambda e: EncodedCodes(e, features()),
    "encoder of pseudo-inputs": lambda e: PseudoInputCodes(e, features()),
    "component": lambda e: MixtureGuide(local, [e, e]),
}


@pytest.mark.parametrize("name", CALLABLES)
def test_a_class_is_no_function(name: str) -> None:
    """A function is, where it is called; a class would be called, and make an instance."""
    make = CALLABLES[name]
    make(function)
    with pytest.raises(
        TypeError, match="(?i)(a )?" + name.split(" ")[0] + ".*got the class Linear"
    ):
        make(nn.Linear)


def test_an_update_is_an_instance_of_its_class() -> None:
    for update, got in ((LearnedUpdate, "the class LearnedUpdate"), (function, "a function")):
        with pytest.raises(TypeError, match=f"update must be .*got {got}"):
            SemiAmortizedGuide(local, encoded(local), update=update)  # type: ignore[arg-type]


def test_a_vectorised_pass_says_how_to_index() -> None:
    """The remedy of the message works, and gives what runs one by one give."""
    group, x = torch.tensor([0, 8, 3, 8]), numbers()

    def program(index: Callable[[Tensor], Tensor]) -> Callable:
        def model(x: Tensor) -> None:
            with pyro.plate("groups", 9, dim=-1):
                b = pyro.sample("b", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("x", dist.Normal(index(b), 1.0), obs=x)

        return model

    def guide(x: Tensor) -> None:
        with pyro.plate("groups", 9, dim=-1):
            pyro.sample("b", dist.Delta(torch.linspace(-1, 1, 9)))

    left, right = program(lambda b: b[group]), program(lambda b: b[..., group])
    one_by_one = IWAE_ELBO(8, vectorize_particles=False).loss(left, guide, x)
    assert IWAE_ELBO(8).loss(right, guide, x) == pytest.approx(one_by_one)
    with pytest.raises(IndexError, match="index 8 is out of bounds") as caught:
        IWAE_ELBO(8).loss(left, guide, x)
    (note,) = caught.value.__notes__
    assert note.startswith("All 8 samples run in one pass") and "b[..., group] for b[group]" in note


# --- Numbers of samples, steps, rows


def fitted(**options: Any) -> Any:
    options = {"loss": IWAE_ELBO(2), "epochs": 1, "progress": False, **options}
    return fit(local, encoded(local), numbers()[:, None], **options)


COUNTS: dict[str, Callable[[Any], Any]] = {
    "num_particles": IWAE_ELBO,
    "num_estimates": lambda k: MIWAE_ELBO(k, 2),
    "num_particles of PIWAE": lambda k: PIWAE_ELBO(2, k),
    "num_particles of CIWAE": CIWAE_ELBO,
    "num_particles of a stratified loss": Stratified_ELBO,
    "num_particles of SIWAE": SIWAE_ELBO,
    "num_particles of MISELBO": MISELBO,
    "num_particles of a recursive loss": RecursiveMixture_ELBO,
    "num_particles of log_marginal": lambda k: log_marginal(
        local, guide_of(), numbers(), num_particles=k
    ),
    "chunk_size": lambda k: log_marginal(local, guide_of(), numbers(), chunk_size=k),
    "num_particles of gaps": lambda k: gaps(local, encoded(local), numbers(), num_particles=k),
    "steps of a search": lambda k: Search(steps=k),
    "first of a schedule": lambda k: Schedule(first=k),
    "components": lambda k: MixtureGuide(local, k),
    "components, recursive": lambda k: RecursiveMixtureGuide(local, k),
    "epochs": lambda k: fitted(epochs=k),
    "batch_size": lambda k: fitted(batch_size=k),
    "validate_every": lambda k: fitted(validate_every=k),
    "rows of Aggressive": lambda k: Aggressive(rows=k),
    "neighbours": lambda k: MAPAGuide(local, nn.Linear(1, 1), features(), neighbours=k),
}
WRONG_COUNTS = (0, -1, 2.0, 2.5, True, False, "2", float("inf"), torch.tensor([2, 3]))


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_whole_numbers(name: str) -> None:
    argument = name.split(" ")[0].rstrip(",")
    for wrong in WRONG_COUNTS:
        message = f"{argument} must .*got|at least one component|at least 2 components, got"
        with pytest.raises(ValueError, match=f"(?s){message}"):
            COUNTS[name](wrong)
    assert not pyro.get_param_store().keys()


def test_none_is_no_count_of_samples() -> None:
    for make in (IWAE_ELBO, CIWAE_ELBO, SIWAE_ELBO, Stratified_ELBO):
        with pytest.raises(ValueError, match="must be an integer >= 1, got None"):
            make(None)  # type: ignore[arg-type]


# --- Files; those of data sets, and damaged ones, are with their own tests


class Payload:
    """What a pickle may do when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def plain(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


DISGUISES: dict[str, Callable[[Any, Path], None]] = {
    "pickle": plain,
    "torch": torch.save,
    "old torch": partial(torch.save, _use_new_zipfile_serialization=False),
}


def resumed(path: Path) -> Any:
    return fitted(checkpoint=path, resume=True)


FILES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "checkpoint": (resumed, CheckpointError, "delete it to start afresh"),
    "table": (Table.load, TableError, "Delete it, and compute it again"),
}


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize("kind", FILES)
def test_no_file_runs_code(kind: str, disguise: str, tmp_path: Path) -> None:
    """Not even where all else is as it must be; the payload itself works."""
    reader, error, remedy = FILES[kind]
    path, marker = tmp_path / "file.pt", tmp_path / "marker"
    for content in (Payload(marker), {"format": 1, "index": Payload(marker)}):
        DISGUISES[disguise](content, path)
        with pytest.raises(error, match=rf"(?s)file\.pt.*{remedy}"):
            reader(path)
        assert not marker.exists()
        pickle.loads(pickle.dumps(content))
        assert marker.exists()
        marker.unlink()
    assert not pyro.get_param_store().keys()


# --- Optional packages


def drawings() -> None:
    next(image_files._drawings(Path("images_background.zip")))


def flow() -> None:
    FlowGuide(local, "coupling")(numbers())


def approximate() -> None:
    nearest(features(), features(), Gaussian(1.0), 2, backend="faiss")


def plot() -> None:
    plot_pareto_k(numbers())


EXTRAS: dict[str, tuple[Callable[[], Any], str]] = {
    "sklearn.datasets": (partial(load, "digits"), "data"),
    "pooch": (partial(load, "mnist"), "data"),
    "PIL.Image": (drawings, "data"),
    "zuko": (flow, "flows"),
    "faiss": (approximate, "neighbours"),
    "matplotlib.pyplot": (plot, "plots"),
}


@pytest.mark.parametrize("module", EXTRAS)
def test_a_missing_package_names_its_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, extra = EXTRAS[module]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'pyro_recursive\[{extra}\]'"):
        run()


def test_a_guide_under_reparam_is_told_where_that_belongs() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(torch.tensor(0.5), 1.0))

    moved = pyro.poutine.reparam(guide, config={"z": LocScaleReparam(0.0)})
    with pytest.raises(ValueError, match=r"Guide site 'z' is observed.*poutine.reparam, put that"):
        IWAE_ELBO(2).loss(model, moved)
