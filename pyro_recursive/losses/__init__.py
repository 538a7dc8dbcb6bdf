"""Losses: drop-in replacements for `pyro.infer.Trace_ELBO`."""
