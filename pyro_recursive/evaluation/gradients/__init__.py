"""How large the gradient of a loss is beside its own noise."""

from pyro_recursive.evaluation.gradients.noise import SNRSweep, gradient_snr, gradient_snr_sweep
from pyro_recursive.evaluation.gradients.signal_to_noise import SignalToNoise, signal_to_noise

__all__ = ["SNRSweep", "SignalToNoise", "gradient_snr", "gradient_snr_sweep", "signal_to_noise"]
