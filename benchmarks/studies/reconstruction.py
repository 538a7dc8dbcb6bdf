"""Reconstructions of test images, of the data set trained on and of another: is any loss better?

The question of a student reproduction of `Tighter Variational Bounds are Not Necessarily Better`
(Rainforth et al., arXiv 1802.04537). Structural similarity (SSIM, Wang et al. 2004) of a binary
image and the decoder's probabilities at one draw of q(z | x): Gaussian windows of 11 x 11 pixels
with sigma 1.5, data range 1, averaged over the windows that lie within the image. The 8 x 8 digits
have windows of 7 x 7 with sigma 0.75.
"""

import argparse
import base64
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from benchmarks import bounds
from benchmarks.bounds import BASELINE, caption, images_of, versus_baseline
from benchmarks.report import (
    Column,
    Results,
    draw_values,
    figure,
    means,
    method_table,
    spread,
    with_error,
)
from benchmarks.run import Method, Methods, Settings, Task
from benchmarks.studies.study import Study, hours
from benchmarks.tasks.image_sets import load_images
from benchmarks.tasks.images import image_task
from pyro_recursive.datasets import fixed_binarize

NAMES = (BASELINE, "IWAE", "MIWAE(8,8)", "PIWAE(8,8)", "CIWAE 0.5")
LARGE = ("mnist", "omniglot")  # what models of 28 x 28 images are tried on
SHOWN = 10  # images of a picture


def tried_on(dataset: str) -> list[str]:
    """Return the data sets that models of a data set reconstruct, its own first."""
    return [dataset, *(each for each in LARGE if dataset != each and dataset in LARGE)]


def ssim(images: Tensor, probabilities: Tensor) -> list[float]:
    """Return the structural similarity of each image ``[n, pixels]`` and its reconstruction."""
    measure, side = _structural_similarity(), round(images.shape[-1] ** 0.5)
    pairs = [each.cpu().unflatten(-1, (side, side)).numpy() for each in (images, probabilities)]
    sigma = 1.5 if side >= 11 else 0.75
    options = {"gaussian_weights": True, "use_sample_covariance": False, "sigma": sigma}
    return [
        round(float(measure(x, y, data_range=1.0, **options)), 4)
        for x, y in zip(*pairs, strict=True)
    ]


def _structural_similarity() -> Any:
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError(
            "SSIM needs scikit-image: pip install 'pyro_recursive[benchmarks]'."
        ) from error
    return structural_similarity


@dataclass(frozen=True)
class ReconstructionTask(Task):
    """A task with the binary test images of other data sets, by name."""

    others: dict[str, Tensor] = field(default_factory=dict)


def task_of(settings: Settings, options: argparse.Namespace, train_points: int) -> Task:
    """Return the task of a data set; what evaluation lacks is missed here, before any run."""
    _structural_similarity()
    others = {}
    for dataset in tried_on(settings.dataset)[1:]:
        images = load_images(dataset, options.download).test[: settings.eval_points]
        others[dataset] = fixed_binarize(images, seed=3)
    own = image_task(settings, options, train_points)
    return ReconstructionTask(**vars(own), others=others)


METHODS: Methods = {name: bounds.METHODS[name] for name in NAMES}


def evaluate(method: Method, task: Task, settings: Settings) -> dict[str, Any]:
    """Return SSIM of each test image of each data set, and some images with reconstructions."""
    assert isinstance(task, ReconstructionTask)
    found: dict[str, Any] = {"ssim": {}, "pictures": {}}
    for dataset, images in {settings.dataset: task.test, **task.others}.items():
        images = images.to(task.test)
        pyro.set_rng_seed(64)
        parts = tqdm(images.split(1000), desc=dataset, leave=False)
        probabilities = torch.cat([_reconstructed(method, part) for part in parts])
        found["ssim"][dataset] = ssim(images, probabilities)
        pair = images[:SHOWN], probabilities[:SHOWN]
        found["pictures"][dataset] = [[_packed(image) for image in each] for each in pair]
    return found


@torch.no_grad()
def _reconstructed(method: Method, images: Tensor) -> Tensor:
    z = poutine.trace(method.guide).get_trace(images).nodes["z"]["value"]
    return method.vae.decoder(z).sigmoid()


def _packed(image: Tensor) -> str:
    """Return an image as text, in 256 levels."""
    return base64.b64encode((255 * image).round().byte().cpu().numpy().tobytes()).decode()


def _row(texts: list[str]) -> Tensor:
    """Return images that were packed, side by side, ``[side, n * side]``."""
    levels = torch.tensor([list(base64.b64decode(text)) for text in texts])
    side = round(levels.shape[-1] ** 0.5)
    return levels.view(-1, side, side).transpose(0, 1).flatten(1)


def report(results: Results) -> str:
    """Return the table: mean SSIM ± a standard error over images; "by seed", over seeds."""
    columns: dict[str, Column] = {}
    for dataset in tried_on(results["settings"]["dataset"]):
        columns[f"SSIM on {dataset}"] = partial(_mean, dataset=dataset)
        columns[f"vs {BASELINE} on {dataset}"] = partial(_versus, dataset=dataset)
        columns[f"vs {BASELINE} on {dataset}, by seed"] = partial(_by_seed, dataset=dataset)
    title = f"trained on {results['settings']['dataset']}"
    return f"{method_table(title, {**columns, 'hours': hours}, results)}\n\n{caption(results)}"


def _mean(name: str, results: Results, dataset: str) -> str:
    return with_error(images_of(name, results, "ssim", dataset), digits=4)


def _versus(name: str, results: Results, dataset: str) -> str:
    return versus_baseline(name, results, "ssim", dataset, digits=4)


def _by_seed(name: str, results: Results, dataset: str) -> str:
    runs, base = results["runs"][name], results["runs"].get(BASELINE, {})
    both = [{s: each[s] for s in runs if s in base} for each in (runs, base)]
    mine, other = (means(each, "ssim", dataset) for each in both)
    return spread(mine - other, sign=True, digits=4)


def plot(results: Results, path: Path) -> None:
    """Draw test images with reconstructions of each method's first seed, and SSIM of all runs."""
    settings, runs = results["settings"], results["runs"]
    datasets = tried_on(settings["dataset"])
    size = (7 * len(datasets), 1.3 * len(runs) + 4.0)
    with figure(path, 2, len(datasets), 120, figsize=size) as (drawn, axes):
        for dataset, (pictures, values) in zip(datasets, axes.T, strict=True):
            pairs = {n: next(iter(r.values()))["pictures"][dataset] for n, r in runs.items()}
            rows = [_row(images) for _, images in pairs.values()]
            originals = [_row(images) for images, _ in pairs.values()][:1]
            pictures.imshow(torch.cat(originals + rows).numpy(), cmap="Greys", vmin=0, vmax=255)
            side = len(rows[0]) if rows else 1
            names = [f"test images of {dataset}", *pairs]
            pictures.set_yticks([side * (n + 0.5) for n in range(len(names))], names)
            pictures.set_xticks([])
            draw_values(values, results, {"o": ("ssim", dataset)})
            values.set(xlabel=f"mean SSIM on {dataset}, by seed")
        networks = f"networks {settings['hidden']}-{settings['latent']}"
        title = f"trained on {settings['dataset']}, {networks}, {settings['epochs']} epochs"
        drawn.suptitle(title)


STUDY = Study(METHODS, evaluate, report, plot, task=task_of)
