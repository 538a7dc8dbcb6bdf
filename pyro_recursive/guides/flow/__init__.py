"""Normalising flows as guides, built on zuko (extra ``flows``)."""

from pyro_recursive.guides.flow.guide import FlowGuide

__all__ = ["FlowGuide"]
