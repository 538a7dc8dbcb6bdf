"""Guides: ordinary Pyro guides, for any loss and for `pyro.infer.Predictive`."""
