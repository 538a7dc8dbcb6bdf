"""Losses at the length of the literature: each bound and estimator, 64 samples per image.

The set-up of `Tighter Variational Bounds are Not Necessarily Better` (Rainforth et al., arXiv
1802.04537) and `Importance Weighted Autoencoders` (Burda et al., 1509.00519): batches of 20, Adam,
rates of 1e-3 to 1e-4 in stages of 3^i epochs (stretched to the epochs run), images that are
binarised anew in each epoch, 400 images for validation. Trace_ELBO is the VAE.
"""

from functools import partial
from pathlib import Path

from benchmarks.bounds import COLUMNS, LOSSES, caption, draw_bounds, evaluate, images_of, method
from benchmarks.report import Column, Results, figure, means, method_table, spread
from benchmarks.run import Methods
from benchmarks.studies.study import Study, hours, seconds_per_epoch
from pyro_recursive import CIWAE_ELBO, MIWAE_ELBO, MultiSampleELBO
from pyro_recursive.bounds import renyi

MORE = {
    "MIWAE(16,4)": lambda: MIWAE_ELBO(16, 4),
    "CIWAE 0.05": lambda: CIWAE_ELBO(64, beta=0.05),
    "VR-IWAE 0.5": lambda: MultiSampleELBO(renyi(0.5), num_particles=64),
}
METHODS: Methods = {
    name: partial(method, make_loss=loss)
    for name, loss in {**LOSSES, **MORE}.items()
    if name != "Pyro RenyiELBO"  # the gradient of IWAE here
}


def _ess(name: str, results: Results) -> str:
    found = images_of(name, results, "test", "ess").item()
    return f"{found:.0f} of {results['settings']['eval_samples']}"


TABLE: dict[str, Column] = {
    **{title: cell for title, cell in COLUMNS.items() if title not in ("ms/step", "ratio")},
    "log p by seed": lambda n, r: spread(means(r["runs"][n], "test", "log_p")),
    "IWAE-64 by seed": lambda n, r: spread(means(r["runs"][n], "test", "iwae_64")),
    "ESS": _ess,
    "s/epoch": seconds_per_epoch,
    "hours": hours,
}


def report(results: Results) -> str:
    """Return the table: nats per image ± a standard error over images, and over seeds."""
    return f"{method_table('loss', TABLE, results)}\n\n{caption(results)}"


def plot(results: Results, path: Path) -> None:
    """Draw learning curves, and the final log p(x) with IWAE-64."""
    settings = results["settings"]
    with figure(path, 1, 2, 120, figsize=(12, 4.5)) as (drawn, axes):
        curves, final = axes[0]
        draw_bounds(curves, final, results)
        networks = f"networks {settings['hidden']}-{settings['latent']}"
        drawn.suptitle(f"{settings['dataset']}, {networks}, {settings['epochs']} epochs")


STUDY = Study(METHODS, evaluate, report, plot, networks=("200-50", "400-20"))
