"""Sequences from a known decoder, and variational autoencoders of them: plain Pyro models."""

import argparse
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from benchmarks.run import Settings, Task
from benchmarks.tasks.images import tanh_network
from pyro_recursive.datasets import SequenceDecoder, lstm_sequences, sequence_evidence

LONG, LENGTH = "long-sequences", 20
DATASETS = ("sequences", "sequences-known", LONG)  # "known": the decoder is the true one
SIZES = {"hidden": 50, "latent": 2}
VOCABULARY = 200  # a fifth of the data set's default: minutes, not hours
ROWS = 25_000  # a decoder memorises 5,000 sequences
VALIDATION_ROWS = 400
NODES = 61  # an error of about 0.002 nats for short sequences


def sequence_task(
    settings: Settings, options: argparse.Namespace | None = None, train_points: int = 1
) -> Task:
    """Draw the sequences; ``exact`` is log p(x) of the test rows under the true decoder."""
    data = lstm_sequences(
        VALIDATION_ROWS + ROWS,
        test_rows=settings.eval_points,
        length=LENGTH if settings.dataset == LONG else 5,
        vocabulary=VOCABULARY,
        hidden=settings.hidden,
    )

    def make_vae(name: str) -> SequenceVAE:
        kind = LongSequenceVAE if settings.dataset == LONG else SequenceVAE
        vae = kind(data.vocabulary, settings.hidden, settings.latent, name=name)
        if settings.dataset == "sequences-known":
            vae.decoder = data.decoder
        return vae

    exact = partial(sequence_evidence, data.decoder, data.test, nodes=NODES)
    validation, train = data.train.split([VALIDATION_ROWS, ROWS])
    sample = train[:train_points]
    return Task(train, validation, data.test, make_vae, train_sample=sample, exact=exact)


class SequenceVAE(nn.Module):
    """Two latents a sequence, an LSTM as decoder, and one as encoder.

    The decoder has the form of the true one of `pyro_recursive.datasets.lstm_sequences`, after
    `Semi-Amortized Variational Autoencoders` (Kim et al., arXiv 1802.02550), so that training and
    inference alone limit it. With ``vae.decoder = data.decoder`` only inference is left to learn.
    """

    def __init__(
        self, vocabulary: int = 1000, hidden: int = 100, latent: int = 2, name: str = ""
    ) -> None:
        super().__init__()
        self.name = name  # a prefix of its parameters in Pyro's store
        self.latent = latent
        self.encoder: nn.Module = SequenceEncoder(vocabulary, hidden, 2 * latent)
        self.decoder = SequenceDecoder(vocabulary, hidden, latent)

    def model(self, x: Tensor) -> None:
        """p(z) p(x | z) for a batch of sequences, int64 ``[batch, length]``."""
        pyro.module(f"{self.name}decoder", self.decoder)
        with pyro.plate("sequences", len(x)):
            zeros = self.decoder.to_symbols.weight.new_zeros(self.latent)
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            # The LSTM depends on x alone: it runs once for each row, whatever the particles.
            symbols: Any = dist.Categorical(logits=self.decoder(z, x), validate_args=False)
            pyro.sample("x", symbols.to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x), a diagonal normal."""
        pyro.module(f"{self.name}encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class SequenceEncoder(nn.Module):
    """The last state of an LSTM and a linear layer: int64 ``[rows, length]`` to ``[rows, D]``.

    Initial values are PyTorch's, those of the last layer uniform after Glorot with zero biases.
    """

    def __init__(self, vocabulary: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.last = nn.Linear(hidden, outputs)
        nn.init.xavier_uniform_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        _, (state, _) = self.lstm(self.embedding(x))
        return self.last(state[-1])


class LongSequenceVAE(SequenceVAE):
    """A decoder that reads the previous symbol alone, and an encoder of all symbols at once.

    What a decoder with a memory would read from the symbols so far is left to the latents.
    """

    def __init__(self, vocabulary: int, hidden: int, latent: int, name: str = "") -> None:
        super().__init__(vocabulary, hidden, latent, name)
        self.encoder = nn.Sequential(
            nn.Embedding(vocabulary, hidden),
            nn.Flatten(-2),
            tanh_network(LENGTH * hidden, hidden, 2 * latent),
        )
        self.decoder = BigramDecoder(vocabulary, hidden, latent)


class BigramDecoder(SequenceDecoder):
    """p(x | z) in which a symbol depends on the one before it and on the latents."""

    def __init__(self, vocabulary: int, hidden: int, latent: int) -> None:
        super().__init__(vocabulary, hidden, latent)
        del self.lstm

    def states(self, x: Tensor) -> Tensor:
        """Return the embedding of the symbol before each, ``[rows, length, hidden]``."""
        start = x.new_full((len(x), 1), self.vocabulary)
        return self.embedding(torch.cat([start, x[:, :-1]], 1))
