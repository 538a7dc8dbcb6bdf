"""MAPA on binary images, beside the autoencoder that it starts from, the VAE and the IWAE.

Images are binarised once: the data have to be the same in each epoch, as their codes are. All
methods have the same decoder (tanh networks with two hidden layers, Bernoulli pixels), the same
initial weights of it for a seed, minibatches and steps of Adam. "MAPA 5" sums a row's nearest code
and draws 5 others, independently, as the paper (arXiv 2403.08941, Eq. 10); "pooled S" shares what
is summed and drawn among the rows of a minibatch; "AE" sums the nearest, which is the row's own.
All MAPA methods are autoencoders for the first tenth of the epochs.

Scores are log p(x) in nats per image, of the same images for all:

- codes: the sum over the codes of all training images, exactly. With a discrete prior this is a
  model as any other, but the codes of training images are among those of its prior, and on these
  images log p(x) is optimistic: an autoencoder that repeats its input has nearly -log N.
- continuous: with the standard normal prior, or for MAPA with normals around the codes
  (`recover_prior`, kind "kde"). For two latents by quadrature on a grid (``grid_error``: the
  largest difference, of an image, from a grid with half the points an axis).
- sampled: the same by importance sampling, from the guide; for MAPA (beyond two latents only, the
  test images only) from a guide whose codes have about the width of the recovered prior's normals.
  In expectation it is a lower bound, and a loose one where the effective sample size (ESS) is
  small. Each draw of MAPA's takes the density of a normal for each code, and by default it has a
  fifth of the draws: where scores are sampled, that is to the disadvantage of MAPA.

Decoder passes count different codes for each image of a minibatch, after the first tenth; an IWAE's
are its samples. Seconds are of training alone, and the table's are told once; run one thread
(OMP_NUM_THREADS=1), or processor seconds are the sum over threads.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import mapa_methods
from benchmarks.experiment import EPOCHS, binarized, held_out, parser_of, sizes, stored
from benchmarks.mapa_images_report import picture_path, plot, report
from benchmarks.mapa_methods import BASELINE, Method
from benchmarks.mapa_training import Diverged, Training, train
from benchmarks.report import hardware, write_json
from benchmarks.vae import VAE, tanh_network
from pyro_recursive import IWAE_ELBO, MAPA_ELBO, MAPAGuide, log_marginal
from pyro_recursive.datasets import load
from pyro_recursive.evaluation.evidence import Evidence
from pyro_recursive.mapa import EncodedCodes
from pyro_recursive.mapa.candidates import Plan
from pyro_recursive.mapa.recover import recover_prior
from pyro_recursive.mapa.table import Table
from pyro_recursive.priors.pairwise import bernoulli_pairs

NEIGHBOURS = 64  # that a row of the table keeps
GRID_LATENTS = 2  # as many as can be integrated over on a grid
REACH = 5.0  # standard deviations of a normal that a grid goes out to
CHUNK_POINTS = 2000  # of a grid
PAIRS = 5_000_000  # draws times codes whose densities are in memory at once
BATCH = 100  # images that importance sampling takes at once
SHOWN = 36  # samples of a picture

METHODS: dict[str, Method] = {
    **{name: mapa_methods.METHODS[name] for name in (BASELINE, "IWAE 5", "AE", "MAPA 5")},
    "pooled 1": mapa_methods.METHODS["pooled 1"],
    "pooled 5": Method(options={"top": 1, "samples": 5, "share": "pooled", "replace": False}),
}


@dataclass(frozen=True)
class Settings:
    """Everything that determines a result, beside its latents, method and seed."""

    dataset: str
    epochs: int
    train_points: int | None
    test_points: int
    batch_size: int
    rate: float
    hidden: int
    eval_samples: int
    recovered_samples: int  # for models with a recovered prior
    nodes: int  # of an axis of the grid


@dataclass
class Images:
    """Binary images ``[rows, pixels]``, and the table that the first guide makes of them."""

    train: Tensor
    test: Tensor
    labels: Tensor
    table: Table | None = None
    table_seconds: float | None = None


def main(arguments: list[str]) -> None:
    """Run what is missing, print tables, write JSON and a picture."""
    options = _parse(arguments)
    settings, folder = _settings(options), Path(options.output)
    images = _load(settings, options.download)
    results = stored(folder, asdict(settings), options.resume, "runs")
    results["hardware"] = hardware()
    wanted = list(product(options.seeds, options.latents, options.methods))
    for seed, latents, name in tqdm(wanted, desc="runs"):
        found = results["runs"].setdefault(str(latents), {}).setdefault(name, {})
        if str(seed) not in found:
            with pyro.validation_enabled(False):
                found[str(seed)] = _run(name, latents, seed, settings, images, folder)
            results["table_seconds"] = images.table_seconds or results.get("table_seconds")
            write_json(folder / "results.json", results)
    print(f"\n{report(results)}\n")
    pictures = plot(results, folder)
    print(f"Wrote {', '.join(map(str, [folder / 'results.json', *pictures]))}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of("mapa-images", __doc__, METHODS)
    parser.set_defaults(eval_points=500)
    parser.add_argument("--latents", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-points", type=int, help="default: all that are not held out")
    parser.add_argument("--rate", type=float, default=3e-3, help="of Adam; it falls to 0")
    parser.add_argument("--nodes", type=int, default=300, help="points of an axis of the grid")
    parser.add_argument("--recovered-samples", type=int, default=1000, help="with recovered priors")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.epochs, options.seeds, options.train_points = 2, options.seeds[:1], 150
        options.eval_points, options.eval_samples, options.nodes = 20, 50, 40
        options.recovered_samples = 20
    if options.epochs is not None and options.epochs < 2:
        parser.error(f"--epochs must be at least 2, one of them to warm up; got {options.epochs}")
    kind = f"mapa-images{'-smoke' * options.smoke}-{options.dataset}"
    options.output = options.output or f"runs/{kind}"
    return options


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        dataset=options.dataset,
        epochs=options.epochs or EPOCHS.get(options.dataset, 10),
        train_points=options.train_points,
        test_points=options.eval_points,
        batch_size=options.batch_size,
        rate=options.rate,
        hidden=sizes(options.dataset)["hidden"],
        eval_samples=options.eval_samples,
        recovered_samples=options.recovered_samples,
        nodes=options.nodes,
    )


def _load(settings: Settings, download: bool) -> Images:
    found = load(settings.dataset, download=download)
    number = settings.train_points or len(found.train)
    data = binarized(found, held_out(settings.dataset), settings.test_points, number)
    labels = found.train_labels[: len(data.train_binary)]
    return Images(data.train_binary, data.test_binary, labels)


# Methods: what `train` needs of each, which is what it needs of those of the curves.


class Learner:
    """A decoder and what it is trained with."""

    guide: Any
    loss: ELBO

    def __init__(self, images: Images, latents: int, hidden: int) -> None:
        self.data, self.latents = images, latents
        self.vae = VAE(images.train.mean(0), hidden, latents)
        self.decoder = self.vae.decoder

    def model(self, x: Tensor, rows: Tensor | None = None) -> None:
        """p(z) p(x | z) for images ``[rows, pixels]``."""
        self.vae.model(x)

    def start(self, batch_size: int) -> None:
        """Get all parameters into place."""

    def begin(self, warming: bool) -> None:
        """Get ready for an epoch."""

    def refresh(self) -> None:
        """Look at the current model: there is nothing to do."""

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters."""
        return list(self.vae.parameters())


class Variational(Learner):
    """A VAE, or an IWAE: the mean-field posterior of an encoder."""

    def __init__(self, images: Images, latents: int, method: Method, hidden: int) -> None:
        super().__init__(images, latents, hidden)
        self.particles = method.particles
        one = method.particles == 1
        self.loss = Trace_ELBO() if one else IWAE_ELBO(method.particles, estimator="dreg")
        self.loss.max_plate_nesting = 1

    def guide(self, x: Tensor, rows: Tensor | None = None) -> None:
        """q(z | x)."""
        self.vae.guide(x)

    def passes(self) -> float:
        """Return the samples of a row."""
        return float(self.particles)

    def codes(self) -> Tensor:
        """Return the posterior means of the training images, ``[N, D]``."""
        return self.vae.encoder(self.data.train).chunk(2, -1)[0]


class Empirical(Learner):
    """A decoder of codes of the training images."""

    def __init__(self, images: Images, latents: int, method: Method, hidden: int) -> None:
        super().__init__(images, latents, hidden)
        self.vae.encoder = tanh_network(images.train.shape[1], hidden, latents)
        self.loss = MAPA_ELBO(max_plate_nesting=1)
        self.guide = MAPAGuide(
            self.model,
            self.vae.encoder,
            images.train,
            table=images.table,
            neighbours=NEIGHBOURS,
            rows=lambda x, rows: rows,
            **method.options,
        )
        self.plan = self.guide.plan

    def start(self, batch_size: int) -> None:
        """Build the table, if none of the guides before has."""
        start = time.perf_counter()
        self.guide.prepare(self.data.train[:batch_size], torch.arange(batch_size))
        if self.data.table is None:
            self.data.table = self.guide.table
            self.data.table_seconds = time.perf_counter() - start

    def begin(self, warming: bool) -> None:
        """Start as an autoencoder: from a decoder that is constant the sums are slow to move."""
        self.guide.plan = Plan(1, 0, "shared") if warming else self.plan

    def passes(self) -> float:
        """Return the different codes of the last step for each of its rows."""
        return self.guide.passes.codes / self.guide.passes.rows

    def codes(self) -> Tensor:
        """Return the codes of the training images, ``[N, D]``."""
        return self.vae.encoder(self.data.train)


def build(name: str, images: Images, latents: int, hidden: int, seed: int) -> Any:
    """Return a method with the initial networks of a seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    method = METHODS[name]
    kind = Variational if method.particles else Empirical
    return kind(images, latents, method, hidden)


def _run(
    name: str, latents: int, seed: int, settings: Settings, images: Images, folder: Path
) -> dict[str, Any]:
    """Train a method, judge it, and keep what is to be drawn."""
    learner = build(name, images, latents, settings.hidden, seed)
    training = Training(settings.epochs, settings.batch_size, settings.rate, settings.hidden)
    try:
        cost = asdict(train(learner, training, seed))
    except Diverged as error:
        return {"failure": str(error)}
    steps = settings.epochs * -(-len(images.train) // settings.batch_size)
    cost["ms_per_step"] = 1000 * cost["processor_seconds"] / steps
    pyro.set_rng_seed(seed + 1000)
    start = time.perf_counter()
    try:
        scores = score(learner, settings)
        if latents == GRID_LATENTS:
            _keep_picture(learner, picture_path(folder, name, latents, seed))
    except ValueError as error:  # of codes that no continuous prior can be recovered from
        return {**cost, "failure": str(error)}
    return {**cost, **scores, "scoring_seconds": time.perf_counter() - start}


# Scores.


@torch.no_grad()
def score(learner: Any, settings: Settings) -> dict[str, Any]:
    """Return log p(x) of each test image, and the mean over as many training images."""
    test, some = learner.data.test, learner.data.train[: len(learner.data.test)]
    found: dict[str, Any] = {}
    recovered, on_grid = isinstance(learner, Empirical), learner.latents == GRID_LATENTS
    if recovered:
        found["codes"] = _rounded(code_evidence(learner, test))
        found["train_codes"] = code_evidence(learner, some).mean().item()
    if on_grid:
        fine, coarse = grid_evidence(learner, torch.cat([test, some]), settings.nodes)
        found["continuous"] = _rounded(fine[: len(test)])
        found["train_continuous"] = fine[len(test) :].mean().item()
        found["grid_error"] = (fine - coarse).abs().max().item()
    if not (recovered and on_grid):
        samples = settings.recovered_samples if recovered else settings.eval_samples
        evidence = sampled(learner, test, samples)
        found["sampled"] = _rounded(evidence.log_marginal)
        found |= {"ess": evidence.ess.median().item(), "samples": samples}
    if not (recovered or on_grid):
        evidence = sampled(learner, some, settings.eval_samples)
        found["train_sampled"] = evidence.log_marginal.mean().item()
    return found


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


@torch.no_grad()
def code_evidence(learner: Empirical, x: Tensor) -> Tensor:
    """Return log (1 / N) sum_i p(x | c_i) over the codes of all training images, ``[rows]``."""
    logits = learner.decoder(learner.codes())
    return bernoulli_pairs(x, logits).double().logsumexp(1) - math.log(len(logits))


@torch.no_grad()
def grid_evidence(learner: Any, x: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Return log p(x) under the continuous prior on a grid, and on one with half the nodes.

    The trapezoidal rule: integrands are zero at the bounds.
    """
    axes, log_prior = _frame(learner, nodes)
    grid, cell = torch.cartesian_prod(*axes), math.log(math.prod(a[1] - a[0] for a in axes))
    even = torch.arange(nodes) % 2 == 0
    also_coarse = torch.cartesian_prod(even, even).all(1)
    fine = coarse = x.new_full((len(x),), -math.inf, dtype=torch.float64)
    for points, chosen in zip(
        grid.split(CHUNK_POINTS), also_coarse.split(CHUNK_POINTS), strict=True
    ):
        table = bernoulli_pairs(x, learner.decoder(points)) + log_prior(points)
        table = table.double()
        fine = torch.logaddexp(fine, table.logsumexp(1))
        coarse = torch.logaddexp(coarse, table[:, chosen].logsumexp(1))
    return fine + cell, coarse + cell + len(axes) * math.log(2)


def _frame(learner: Any, nodes: int) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """Return the axes of a grid around all that a prior and the codes take in, and the prior."""
    codes = learner.codes()
    if isinstance(learner, Empirical):
        prior: Any = recover_prior(codes, "kde", held_out=0)
        reach = REACH * prior.width * codes.std(0)
        low, high = codes.amin(0) - reach, codes.amax(0) + reach
        density = prior()
    else:
        low, high = codes.amin(0).clamp(max=-REACH), codes.amax(0).clamp(min=REACH)
        density = pyro.distributions.Normal(torch.zeros_like(low), 1.0).to_event(1)
    bounds = zip(low.tolist(), high.tolist(), strict=True)
    return [torch.linspace(a, b, nodes) for a, b in bounds], density.log_prob


def sampled(learner: Any, x: Tensor, samples: int) -> Evidence:
    """Return log p(x) under the continuous prior by importance sampling, ``[rows]`` each."""
    model, guide, size = learner.model, learner.guide, None
    if isinstance(learner, Empirical):
        model, guide = _recovered(learner)
        size = max(1, min(samples, PAIRS // (BATCH * len(learner.data.train))))
    pyro.clear_param_store()  # of the guide that was trained
    parts = [
        log_marginal(model, guide, batch, num_particles=samples, chunk_size=size, diagnostics=True)
        for batch in x.split(BATCH)
    ]
    return Evidence(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _recovered(learner: Empirical) -> tuple[Any, MAPAGuide]:
    """Return the model with a continuous prior, and codes as wide as its normals to propose."""
    model: Any = learner.guide.recovered("kde", held_out=0)
    codes = learner.codes()
    scale = float(model.prior.width) * codes.var(0).mean().sqrt().item()
    wide = EncodedCodes(learner.vae.encoder, learner.data.train, scale=scale)
    table = learner.data.table
    return model, MAPAGuide(learner.model, wide, learner.data.train, table=table, name="proposal")


@torch.no_grad()
def _keep_picture(learner: Any, path: Path) -> None:
    """Keep the codes, and means of images that the continuous model draws."""
    codes = learner.codes()
    if isinstance(learner, Empirical):
        z = recover_prior(codes, "kde", held_out=0)().sample((SHOWN,))
    else:
        z = torch.randn(SHOWN, learner.latents)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"codes": codes, "labels": learner.data.labels, "samples": learner.decoder(z).sigmoid()}
    torch.save(kept, path)
