"""Synthetic sequences of which everything is known: latents, decoder and the exact log p(x)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_recursive.datasets.sequence_decoder import SequenceDecoder

__all__ = ["Sequences", "lstm_sequences", "sequence_evidence"]

_LATENT = 2
_LSTM_GAIN = 2.0
_STATE_GAIN = 3.0  # what came before then weighs about as much as the latents do
_CHUNK_NUMBERS = 2**22  # logits of one chunk


@dataclass(frozen=True, eq=False, repr=False)
class Sequences:
    """Sequences of symbols with the latents and the decoder that they were drawn from.

    ``train`` and ``test`` are int64 ``[rows, length]``, ``train_latents`` and ``test_latents``
    ``[rows, 2]``; ``decoder`` is p(x | z), in `eval` mode, its parameters frozen.
    """

    train: Tensor
    test: Tensor
    train_latents: Tensor
    test_latents: Tensor
    decoder: SequenceDecoder

    @property
    def vocabulary(self) -> int:
        """The number of symbols."""
        return self.decoder.vocabulary

    def __repr__(self) -> str:
        """Show the shapes instead of the numbers."""
        train, test = list(self.train.shape), list(self.test.shape)
        return f"Sequences(train={train}, test={test}, vocabulary={self.vocabulary})"


def lstm_sequences(
    rows: int = 5000,
    *,
    test_rows: int = 500,
    length: int = 5,
    vocabulary: int = 1000,
    hidden: int = 100,
    latent_gain: float = 1.0,
    gain: float = 4.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Sequences:
    """Draw sequences from an LSTM decoder with random, known parameters, and two latents each.

    ``z ~ N(0, I_2)`` and ``x_t ~ Categorical(softmax(MLP([h_t, z])))``, see `SequenceDecoder`. The
    same for the same ``seed``: all is drawn on the CPU in float64, by a generator of its own, and
    moved to ``dtype`` and ``device`` then. Torch's global generator is left alone.

    The sizes (5000 training rows of 5 symbols out of 1000, an LSTM of size 100, two latents) are
    those of the paper as far as we know. The number of test rows and the scale of the
    parameters are our choice: all are normal, with mean 0 and standard deviation
    ``g / sqrt(hidden)``, where ``g`` is 2 in the LSTM, 3 from its state to the hidden layer and
    ``gain`` to the logits; weights from the latents have ``latent_gain``, embeddings 1, and biases
    are 0. On the default test rows the latents' mutual information with a sequence, the mean of
    ``log p(x | z) - log p(x)``, is 2.65 nats (standard error 0.05), and log p(x) is -21.7 (0.2);
    of symbols drawn evenly it would be -34.5. Larger gains: more information, and posteriors that
    are harder to fit.

    Raises ValueError for sizes below 1 (2 for ``vocabulary``), and for gains that are negative or
    not finite.

    Source: `Semi-Amortized Variational Autoencoders` (Kim et al., arXiv 1802.02550).

    >>> data = lstm_sequences(20, test_rows=5, vocabulary=10, hidden=8)
    >>> data
    Sequences(train=[20, 5], test=[5, 5], vocabulary=10)
    >>> information = data.decoder.log_prob(data.test_latents, data.test) - sequence_evidence(
    ...     data.decoder, data.test
    ... )
    >>> information.shape
    torch.Size([5])
    """
    sizes = {"rows": rows, "test_rows": test_rows, "length": length, "hidden": hidden}
    for name, size in sizes.items():
        _require_at_least(1, name, size)
    _require_at_least(2, "vocabulary", vocabulary)
    for name, value in (("latent_gain", latent_gain), ("gain", gain)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    generator = torch.Generator("cpu").manual_seed(seed)
    decoder = _random_decoder(vocabulary, hidden, latent_gain, gain, generator)
    drawn = []
    for count in (test_rows, rows):  # in this order the test rows do not depend on `rows`
        z = _normal((count, _LATENT), generator)
        drawn.append((decoder.sample(z, length, generator).to(device), z.to(device, dtype)))
    (test, test_latents), (train, train_latents) = drawn
    return Sequences(train, test, train_latents, test_latents, decoder.to(device, dtype))


@torch.no_grad()
def sequence_evidence(
    decoder: SequenceDecoder,
    x: Tensor,
    *,
    nodes: int = 121,
    bound: float = 7.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Return log p(x) of each sequence in nats, float64 ``[rows]``, without Monte Carlo error.

    The trapezoid rule on a grid of ``nodes`` points for each of one or two latents, from
    ``-bound`` to ``bound``, for ``z ~ N(0, I)`` and any decoder, true or learned. Its error falls
    exponentially with the number of nodes once they are closer than a posterior is wide. For the
    sequences of `lstm_sequences`, default sizes, it is below 1e-6 nats (1e-5 in float32); 61 nodes
    are enough for 1e-2. For another decoder, see what more nodes change.

    Arguments:
        decoder: p(x | z); its dtype is that of the densities, and sums are kept in float64.
        x: int64 ``[rows, length]``.
        nodes: for each latent, at least 2.
        bound: where the grid ends; beyond 7 lie 3e-12 of the prior of one latent.
        chunk_size: pairs of a node and a row at once; by default they have four million logits.

    Cost: ``nodes**2 * rows * length`` softmaxes over the vocabulary, two minutes for the 500 test
    rows of `lstm_sequences` on one CPU core; memory does not grow with rows or nodes.

    Raises ValueError where ``x`` is no sequence of symbols of the vocabulary, the decoder has more
    than two latents, or a number is out of range.
    """
    _check_sequences(decoder, x)
    _require_at_least(2, "nodes", nodes)
    if not 0 < bound < math.inf:
        raise ValueError(f"bound must be finite and positive, got {bound}")
    if chunk_size is None:
        chunk_size = max(1, _CHUNK_NUMBERS // (x.shape[1] * decoder.vocabulary))
    _require_at_least(1, "chunk_size", chunk_size)
    z, log_weights = _grid(decoder, nodes, bound)
    parts = [_integral(decoder, part, z, log_weights, chunk_size) for part in x.split(chunk_size)]
    return torch.cat(parts)


def _integral(
    decoder: SequenceDecoder, x: Tensor, z: Tensor, log_weights: Tensor, chunk_size: int
) -> Tensor:
    """Return the logarithm of the weighted sum of p(x | z) over the nodes, for rows of ``x``."""
    states = decoder.states(x)
    nodes = chunk_size // max(1, len(x))
    total = log_weights.new_full((len(x),), -math.inf)
    for chunk, weights in zip(z.split(nodes), log_weights.split(nodes), strict=True):
        log_p = decoder.log_prob(chunk[:, None], x, states) + weights[:, None]
        total = torch.logaddexp(total, log_p.logsumexp(0))
    return total


def _grid(decoder: SequenceDecoder, nodes: int, bound: float) -> tuple[Tensor, Tensor]:
    """Return the grid's nodes ``[n, latent]`` and the logarithms of their weights, float64 [n]."""
    like = decoder.to_symbols.weight
    axis = torch.linspace(-bound, bound, nodes, dtype=torch.float64, device=like.device)
    log_weight = -0.5 * axis**2 - 0.5 * math.log(2 * math.pi) + math.log(2 * bound / (nodes - 1))
    # The first and last node would have half a weight, which makes no difference at `bound`.
    z = torch.cartesian_prod(*[axis] * decoder.latent).view(-1, decoder.latent)
    log_weights = torch.cartesian_prod(*[log_weight] * decoder.latent).view(-1, decoder.latent)
    return z.to(like.dtype), log_weights.sum(-1)


def _random_decoder(
    vocabulary: int, hidden: int, latent_gain: float, gain: float, generator: torch.Generator
) -> SequenceDecoder:
    """Return a decoder in float64 on the CPU, its parameters drawn from the generator and fixed."""
    with torch.random.fork_rng(devices=[]):  # PyTorch's own initial values are drawn in vain
        decoder = SequenceDecoder(
            vocabulary, hidden, _LATENT, dtype=torch.float64, device=torch.device("cpu")
        )
    scales = {
        "embedding.weight": 1.0,
        "lstm.weight_ih_l0": _LSTM_GAIN / math.sqrt(hidden),
        "lstm.weight_hh_l0": _LSTM_GAIN / math.sqrt(hidden),
        "from_state.weight": _STATE_GAIN / math.sqrt(hidden),
        "from_latents.weight": latent_gain,
        "to_symbols.weight": gain / math.sqrt(hidden),
    }
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(False)
        parameter.copy_(scales.get(name, 0.0) * _normal(parameter.shape, generator))
    return decoder.eval()  # in training mode Pyro would warn that nothing is to be trained


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _require_at_least(least: int, name: str, value: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def _check_sequences(decoder: SequenceDecoder, x: Tensor) -> None:
    if decoder.latent > 2:
        raise ValueError(
            f"quadrature is for one or two latents, and the decoder has {decoder.latent}; estimate "
            "its log p(x) with pyro_recursive.log_marginal"
        )
    if x.dim() != 2 or not x.shape[1] or x.dtype != torch.int64:
        raise ValueError(f"x must be int64 [rows, length >= 1], got {x.dtype} {list(x.shape)}")
    if len(x) and not 0 <= x.min() <= x.max() < decoder.vocabulary:
        raise ValueError(
            f"x has symbols from {x.min()} to {x.max()}, and the decoder's are 0 to "
            f"{decoder.vocabulary - 1}"
        )
