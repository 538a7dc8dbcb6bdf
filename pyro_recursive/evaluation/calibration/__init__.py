"""Simulation-based calibration of guides, from their ranks to a verdict."""

from pyro_recursive.evaluation.calibration.checks import calibration, calibration_by_fits
from pyro_recursive.evaluation.calibration.uniformity import Calibration, Uniformity, uniformity

__all__ = ["Calibration", "Uniformity", "calibration", "calibration_by_fits", "uniformity"]
