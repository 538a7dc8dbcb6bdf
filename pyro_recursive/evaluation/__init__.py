"""How good an approximation is; never imported by models, guides or losses.

ArviZ takes seconds to import: `pyro_recursive.evaluation.arviz` is imported by itself.
"""

from pyro_recursive.evaluation.diversity import Diversity, jensen_shannon, mixture_diversity
from pyro_recursive.evaluation.draws import Draws
from pyro_recursive.evaluation.evidence import Evidence, log_marginal
from pyro_recursive.evaluation.gaps import Gaps, gaps
from pyro_recursive.evaluation.importance import (
    PSIS,
    ImportanceWeights,
    effective_sample_size,
    importance_weights,
    pareto_k_threshold,
    psis,
)
from pyro_recursive.evaluation.information import (
    ActiveUnits,
    Rate,
    active_units,
    mutual_information,
    rate_of,
)
from pyro_recursive.evaluation.new_rows import Prediction, predict
from pyro_recursive.evaluation.parallel import evaluate_in_parallel
from pyro_recursive.evaluation.plots import (
    plot_ecdf_difference,
    plot_gaps,
    plot_gradient_snr,
    plot_history,
    plot_pareto_k,
    plot_ranks,
    plot_saliency,
)
from pyro_recursive.evaluation.predictions import (
    log_likelihoods,
    posterior_draws,
    predictive_draws,
    prior_draws,
)
from pyro_recursive.evaluation.ranks import Calibration
from pyro_recursive.evaluation.saliency import saliency
from pyro_recursive.evaluation.sbc import calibration, calibration_by_fits
from pyro_recursive.evaluation.snr import (
    SignalToNoise,
    SNRSweep,
    gradient_snr,
    gradient_snr_sweep,
    signal_to_noise,
)

__all__ = [
    "PSIS",
    "ActiveUnits",
    "Calibration",
    "Diversity",
    "Draws",
    "Evidence",
    "Gaps",
    "ImportanceWeights",
    "Prediction",
    "Rate",
    "SNRSweep",
    "SignalToNoise",
    "active_units",
    "calibration",
    "calibration_by_fits",
    "effective_sample_size",
    "evaluate_in_parallel",
    "gaps",
    "gradient_snr",
    "gradient_snr_sweep",
    "importance_weights",
    "jensen_shannon",
    "log_likelihoods",
    "log_marginal",
    "mixture_diversity",
    "mutual_information",
    "pareto_k_threshold",
    "plot_ecdf_difference",
    "plot_gaps",
    "plot_gradient_snr",
    "plot_history",
    "plot_pareto_k",
    "plot_ranks",
    "plot_saliency",
    "posterior_draws",
    "predict",
    "predictive_draws",
    "prior_draws",
    "psis",
    "rate_of",
    "saliency",
    "signal_to_noise",
]
