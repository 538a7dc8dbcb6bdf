"""One run of a model and a guide for all particles, and its log-densities ``[M, K, *plates]``."""
