"""Cost of a training step beside hand-written PyTorch and Pyro's own losses, and of evaluation.

All variants do the same work on the same networks (784-200-200-50 and back), with fused Adam
where no other is named; stock rows are `pyro.infer.SVI` with Pyro's optimiser. Repeats are
interleaved; a ratio is the median of per-repeat ratios. ``--validation`` leaves Pyro's argument
checks on, as they are by default; hand-written code has none, so they are off unless asked for.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyro
import torch
from pyro.infer import ELBO, SVI, RenyiELBO, Trace_ELBO
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.report import Results, finish, hardware, table
from benchmarks.run import Costs, base_parser, costs_of, parse, peak_megabytes
from benchmarks.tasks.images import VAE
from pyro_recursive import IWAE_ELBO, PIWAE_ELBO, log_marginal

HAND = "hand-written"
SIZES = [(batch, particles) for batch in (20, 100) for particles in (1, 8, 64)]
PIXELS = 784


def main(arguments: list[str]) -> None:
    """Time every size, measure the memory of an evaluation, print tables; write JSON."""
    parser = base_parser("speed", __doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--validation", action="store_true", help="leave Pyro's checks on")
    options = parse(parser, arguments, repeats=1)
    results: Results = {"settings": vars(options), "hardware": hardware()}
    # The memory first: the process knows only its peak.
    results["evaluation"] = evaluation_memory(100 if options.smoke else 5000)
    pyro.enable_validation(options.validation)
    results["steps"] = {
        f"{batch} x {particles}": time_steps(batch, particles, options.repeats)
        for batch, particles in (SIZES[:2] if options.smoke else SIZES)
    }
    pyro.enable_validation(True)
    path = Path(options.output) / f"speed{'-validation' if options.validation else ''}.json"
    finish(results, path, report(results))


def time_steps(batch: int, particles: int, repeats: int) -> Costs:
    """Return median milliseconds and ratios to the hand-written step, for every variant."""
    x = torch.bernoulli(torch.full((batch, PIXELS), 0.3))
    pyro.clear_param_store()
    hand = partial(by_hand, x=x, particles=particles)
    steps = {HAND: _step(HAND, x, hand), f"{HAND}, default Adam": _step("", x, hand, fused=False)}
    for name, loss in losses(particles).items():
        steps[name] = _step(name, x, partial(_by_loss, loss=loss, x=x))
    for name in [name for name in ("Trace_ELBO", "RenyiELBO") if name in steps]:
        vae = VAE(x.mean(0), name=f"{name} of SVI")
        optimizer = pyro.optim.Adam({"lr": 1e-3})
        svi = SVI(vae.model, vae.guide, optimizer, losses(particles)[name])
        steps[f"{name}, stock SVI"] = partial(svi.step, x)
    calls = max(1, 200 // (batch * particles))
    return costs_of(steps, repeats, calls, HAND)


def losses(particles: int) -> dict[str, ELBO]:
    """Return the losses to compare, all vectorised over particles."""
    pyro_options = dict(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    members: dict[str, ELBO] = {
        "IWAE pathwise": IWAE_ELBO(particles),
        "IWAE dreg": IWAE_ELBO(particles, estimator="dreg"),
        "IWAE stl": IWAE_ELBO(particles, estimator="stl"),
        "Trace_ELBO": Trace_ELBO(**pyro_options),
    }
    if particles > 1:  # Pyro's class needs more than one particle
        members["RenyiELBO"] = RenyiELBO(alpha=0, **pyro_options)
        members["PIWAE dreg"] = PIWAE_ELBO(particles // 8, 8, estimator="dreg")
    return members


def by_hand(vae: VAE, x: Tensor, particles: int) -> None:
    """Backpropagate the IWAE loss as one writes it without any library."""
    loc, log_scale = vae.encoder(x).chunk(2, -1)
    noise = torch.randn(particles, *loc.shape)
    z = loc + log_scale.exp() * noise
    logits = vae.decoder(z)
    errors = binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    log_weights = (0.5 * (noise**2 - z**2) + log_scale).sum(-1) - errors.sum(-1)
    (-(log_weights.logsumexp(0) - math.log(particles)).sum()).backward()


def _by_loss(vae: VAE, loss: ELBO, x: Tensor) -> None:
    loss.loss_and_grads(vae.model, vae.guide, x)


def _step(
    name: str, x: Tensor, backward: Callable[[VAE], None], fused: bool = True
) -> Callable[[], None]:
    vae = VAE(x.mean(0), name=name)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=fused)

    def step() -> None:
        optimizer.zero_grad()
        backward(vae)
        optimizer.step()

    return step


def evaluation_memory(samples: int, points: int = 100) -> dict[str, float]:
    """Return the megabytes that log p(x) of some images takes above the model, at its peak."""
    pyro.set_rng_seed(0)
    x = torch.bernoulli(torch.full((points, PIXELS), 0.3))
    vae = VAE(x.mean(0))
    log_marginal(vae.model, vae.guide, x, num_particles=1)
    before = peak_megabytes()
    log_marginal(vae.model, vae.guide, x, num_particles=samples)
    return {"points": points, "samples": samples, "megabytes": peak_megabytes() - before}


def report(results: Results) -> str:
    """Return the ratios of all sizes as one table, and a line about memory."""
    steps = results["steps"]
    variants = list(dict.fromkeys(name for size in steps.values() for name in size["ms"]))
    rows = [[name, *(_cell(size, name) for size in steps.values())] for name in variants]
    memory = results["evaluation"]
    return (
        table(["ms per step (ratio), batch x K", *steps], rows)
        + f"\n\nlog p(x) of {memory['points']} images with {memory['samples']} samples: "
        + f"{memory['megabytes']:.0f} MB above the model"
    )


def _cell(size: dict[str, dict[str, float]], name: str) -> str:
    if name not in size["ms"]:
        return "-"
    return f"{size['ms'][name]:.2f} ({size['ratio'][name]:.2f})"
