"""The main job: one VAE under Trace_ELBO and under each multi-sample bound, on equal budgets.

Every method trains the same Pyro model and guide from the same initial weights with the same number
of samples per datum. Each is then judged by what it learned: log p(x) by IWAE-5000 on test and
training images, IWAE-64, their difference (minus the divergence that the guide leaves with 64
samples), the effective sample size, and the cost of a step, timed side by side.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO
from torch import Tensor
from tqdm import tqdm

from benchmarks.experiment import (
    EPOCHS,
    OPTIMIZER,
    Data,
    binarized,
    held_out,
    parser_of,
    sizes,
    stored,
)
from benchmarks.report import hardware, table, write_json
from benchmarks.timing import interleaved, medians, ratios
from benchmarks.vae import VAE
from pyro_recursive import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, fit, log_marginal
from pyro_recursive.datasets import dynamic_binarize, load

BASELINE = "Trace_ELBO"

# Every method draws 64 samples per datum and step.
METHODS: dict[str, Callable[[], ELBO]] = {
    BASELINE: lambda: Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1),
    "Pyro RenyiELBO": lambda: RenyiELBO(
        alpha=0, num_particles=64, vectorize_particles=True, max_plate_nesting=1
    ),
    "IWAE": lambda: IWAE_ELBO(64),
    "IWAE dreg": lambda: IWAE_ELBO(64, estimator="dreg"),
    "MIWAE(8,8)": lambda: MIWAE_ELBO(8, 8),
    "PIWAE(8,8)": lambda: PIWAE_ELBO(8, 8),
    "CIWAE 0.5": lambda: CIWAE_ELBO(64, beta=0.5),
    "CIWAE learned": lambda: CIWAE_ELBO(64, learn_beta=True),
}


@dataclass(frozen=True)
class Settings:
    """Everything that determines a result; kept beside the results, so that a resume can check."""

    dataset: str
    epochs: int
    batch_size: int
    hidden: int
    latent: int
    seed: int
    eval_points: int
    eval_samples: int


def main(arguments: list[str]) -> None:
    """Train, evaluate, print the table; write JSON and a plot."""
    options = _parse(arguments)
    settings, folder = _settings(options), Path(options.output)
    images, points = load(settings.dataset, download=options.download), settings.eval_points
    data = binarized(images, held_out(settings.dataset), points, points)
    results = stored(folder, asdict(settings), options.resume, "methods")
    for name in tqdm(options.methods, desc="methods"):
        if name not in results["methods"]:
            results["methods"][name] = _run(name, settings, data, folder, options.resume)
            write_json(folder / "results.json", results)
    results["steps"] = _time_steps(settings, data, options.methods, options.timing_repeats)
    results["hardware"] = hardware()
    write_json(folder / "results.json", results)
    print(f"\n{report(results)}\n")
    plot(results, folder / "results.png")
    print(f"Wrote {folder / 'results.json'} and {folder / 'results.png'}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of("bounds", __doc__, METHODS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    kind = "smoke" if options.smoke else "bounds"
    options.output = options.output or f"runs/{kind}-{options.dataset}"
    if options.smoke:
        options.epochs, options.eval_points, options.eval_samples = 1, 20, 100
        options.timing_repeats = 1
    return options


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        dataset=options.dataset,
        epochs=options.epochs or EPOCHS.get(options.dataset, 8),
        batch_size=options.batch_size,
        **sizes(options.dataset),
        seed=options.seed,
        eval_points=options.eval_points,
        eval_samples=options.eval_samples,
    )


def _new_vae(settings: Settings, data: Data) -> VAE:
    """Return the same initial networks for every method, and nothing else in Pyro's memory."""
    pyro.clear_param_store()
    pyro.set_rng_seed(settings.seed)
    return VAE(data.train.mean(0), settings.hidden, settings.latent)


def _run(name: str, settings: Settings, data: Data, folder: Path, resume: bool) -> dict[str, Any]:
    """Train and evaluate one method."""
    vae, loss = _new_vae(settings, data), METHODS[name]()
    folder.mkdir(parents=True, exist_ok=True)
    history = fit(
        vae.model,
        vae.guide,
        data.train,
        loss=loss,
        epochs=settings.epochs,
        optimizer=OPTIMIZER,
        batch_size=settings.batch_size,
        transform=dynamic_binarize,
        validation=data.validation,
        validation_loss=IWAE_ELBO(64),
        checkpoint=folder / f"{_slug(name)}.pt",
        resume=resume,
        seed=settings.seed,
    )
    result: dict[str, Any] = {
        "history": asdict(history),
        "test": _evaluate(vae, data.test_binary, settings.eval_samples),
        "train": _evaluate(vae, data.train_binary, settings.eval_samples),
    }
    if isinstance(loss, CIWAE_ELBO):
        result["beta"] = float(loss.beta)
    return result


def _evaluate(vae: VAE, images: Tensor, samples: int) -> dict[str, Any]:
    """Return log p(x) and IWAE-64 per image, in nats, and the mean ESS per 64 and all samples."""
    pyro.set_rng_seed(64)
    evidence, tight, ess, ess_64 = [], [], [], []
    for batch in tqdm(images.split(100), desc="log p(x)", leave=False):
        whole = log_marginal(vae.model, vae.guide, batch, num_particles=samples, diagnostics=True)
        # The mean of 8 independent IWAE-64 values is less noisy than one.
        few = [
            log_marginal(vae.model, vae.guide, batch, num_particles=64, diagnostics=True)
            for _ in range(8)
        ]
        evidence.append(whole.log_marginal)
        ess.append(whole.ess)
        tight.append(torch.stack([one.log_marginal for one in few]).mean(0))
        ess_64.append(torch.stack([one.ess for one in few]).mean(0))
    return {
        "log_p": torch.cat(evidence).tolist(),
        "iwae_64": torch.cat(tight).tolist(),
        "ess": torch.cat(ess).mean().item(),
        "ess_64": torch.cat(ess_64).mean().item(),
    }


def _time_steps(
    settings: Settings, data: Data, methods: list[str], repeats: int
) -> dict[str, dict[str, float]]:
    """Time a training step of every method, interleaved."""
    batch = dynamic_binarize(data.train[: settings.batch_size])
    pyro.clear_param_store()
    steps = {
        name: _step(name, settings, data, batch) for name in dict.fromkeys([BASELINE, *methods])
    }
    timings = interleaved(steps, repeats, calls=3)
    return {"ms": medians(timings), "ratio": ratios(timings, BASELINE)}


def _step(name: str, settings: Settings, data: Data, batch: Tensor) -> Callable[[], object]:
    """Return one step of a method on networks of its own, with the optimiser of the main job."""
    vae = VAE(data.train.mean(0), settings.hidden, settings.latent, name=name)
    loss, optimizer = METHODS[name](), OPTIMIZER(vae.parameters())
    model, guide = vae.model, vae.guide

    def step() -> None:
        optimizer.zero_grad()
        loss.loss_and_grads(model, guide, batch)
        optimizer.step()

    return step


def report(results: dict[str, Any]) -> str:
    """Return the table of a run: nats per image, ± one standard error over images."""
    header = ["loss", "test log p", "vs Trace_ELBO", "test IWAE-64", "gap (-KL)", "train log p"]
    header += ["ESS of 64", "ms/step", "ratio"]
    rows = [_row(name, results) for name in results["methods"]]
    return table(header, rows)


def _row(name: str, results: dict[str, Any]) -> list[str]:
    method, steps = results["methods"][name], results["steps"]
    test, train = method["test"], method["train"]
    log_p, tight = torch.tensor(test["log_p"]), torch.tensor(test["iwae_64"])
    base = results["methods"].get(BASELINE)
    paired = "" if base is None else _mean(log_p - torch.tensor(base["test"]["log_p"]), sign=True)
    beta = f" ({method['beta']:.2f})" if "beta" in method and "learned" in name else ""
    return [
        name + beta,
        _mean(log_p),
        paired,
        _mean(tight),
        _mean(tight - log_p, sign=True),
        _mean(torch.tensor(train["log_p"])),
        f"{test['ess_64']:.1f}",
        f"{steps['ms'][name]:.1f}",
        f"{steps['ratio'][name]:.2f}",
    ]


def _mean(values: Tensor, sign: bool = False) -> str:
    error = values.std().item() / len(values) ** 0.5
    return f"{values.mean().item():{'+' if sign else ''}.2f} ± {error:.2f}"


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw learning curves, the final log p(x) with IWAE-64, and cost."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, final, cost) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    names, samples = list(results["methods"]), results["settings"]["eval_samples"]
    for number, name in enumerate(names):
        history = results["methods"][name]["history"]
        bound = [-value / _rows(results) for value in history["validation"]]
        curves.plot(history["epoch"], bound, ".-", color=f"C{number}", label=name)
        test = results["methods"][name]["test"]
        for key, marker in (("log_p", "o"), ("iwae_64", "|")):
            values = torch.tensor(test[key])
            final.plot(values.mean(), number, marker, color=f"C{number}", markersize=9)
    best = max(
        max(-v / _rows(results) for v in m["history"]["validation"])
        for m in results["methods"].values()
    )
    first = [-m["history"]["validation"][0] / _rows(results) for m in results["methods"].values()]
    curves.set_ylim(min(max(first), best - 1e-3) if len(first) > 1 else None, None)
    curves.set(xlabel="epoch", ylabel="validation IWAE-64 (nats per image)", title="learning")
    curves.legend(fontsize=8)
    final.set_yticks(range(len(names)), names)
    final.invert_yaxis()
    final.set(xlabel="nats per test image", title=f"IWAE-{samples} (dot) and IWAE-64 (bar)")
    ratio = results["steps"]["ratio"]
    cost.barh(
        range(len(names)), [ratio[n] for n in names], color=[f"C{i}" for i in range(len(names))]
    )
    cost.set_yticks(range(len(names)), names)
    cost.invert_yaxis()
    cost.axvline(1.0, color="black", linewidth=0.8)
    cost.set(xlabel="step time / Trace_ELBO", title="cost of a step, equal samples")
    figure.suptitle(f"{results['settings']['dataset']}: training with 64 samples per image")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _rows(results: dict[str, Any]) -> float:
    """Return the mean size of a validation batch, which the recorded loss sums over."""
    rows = held_out(results["settings"]["dataset"])
    batch = results["settings"]["batch_size"]
    return rows / -(-rows // batch)
