"""What a graph cannot hold."""


class Unsupported(NotImplementedError):
    """Says why a run cannot be compiled."""
