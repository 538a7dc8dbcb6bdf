"""Semi-amortised inference beside a VAE, SVI and iterative inference, at any length of training.

The methods and scores of `python -m benchmarks refinement`, on images and on text-like sequences of
20 symbols whose decoder reads the previous symbol alone. (With an LSTM as decoder, on 5 symbols,
posteriors collapse nearly wholly: `refinement --dataset sequences`.) After `Semi-Amortized
Variational Autoencoders` (Kim et al., arXiv 1802.02550), whose decoder of text is an LSTM; a
learning rate that stays, as theirs for images.
"""

from benchmarks.methods.refinement import METHODS
from benchmarks.refinement import COLUMNS, RefinementSettings, evaluate, plot, task_of
from benchmarks.report import Column, Results, means, method_table, spread
from benchmarks.studies.study import Study, hours, seconds_per_epoch
from benchmarks.tasks.sequences import LONG, SIZES

TIMED = ("step", "inference, us a row of a batch", "us alone")
TABLE: dict[str, Column] = {
    **{title: cell for title, cell in COLUMNS.items() if title not in TIMED},
    "saliency": lambda n, r: spread(means(r["runs"][n], "saliency")),
    "s/epoch": seconds_per_epoch,
    "hours": hours,
}


def report(results: Results) -> str:
    """Return the table, in nats per row: mean ± standard deviation over seeds."""
    return method_table("method", TABLE, results)


STUDY = Study(
    METHODS,
    evaluate,
    report,
    plot,
    datasets=("mnist", "omniglot", "digits", LONG),
    own_networks={"digits": ("100-10",), LONG: (f"{SIZES['hidden']}-{SIZES['latent']}",)},
    validation_particles=16,
    settings=RefinementSettings,
    task=task_of,
    batch_size=50,
    scheduler=None,
)
