"""The variational autoencoder of sequences of symbols: a plain Pyro model, and an encoder."""

from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyro_recursive.datasets import SequenceDecoder


class SequenceVAE(nn.Module):
    """Two latents a sequence, an LSTM to decode them by, and one to encode sequences.

    The decoder has the form of the true one of `pyro_recursive.datasets.lstm_sequences`, after
    `Semi-Amortized Variational Autoencoders` (Kim et al., arXiv 1802.02550): what it does not
    learn is the fault of the training or of inference. `pyro_recursive.datasets.sequence_evidence`
    knows its exact log p(x). With ``vae.decoder = data.decoder``, the true one, only inference is
    left to learn.
    """

    def __init__(
        self, vocabulary: int = 1000, hidden: int = 100, latent: int = 2, name: str = ""
    ) -> None:
        super().__init__()
        self.name = name  # tells its parameters in Pyro's store from those of other models
        self.latent = latent
        self.encoder = SequenceEncoder(vocabulary, hidden, 2 * latent)
        self.decoder = SequenceDecoder(vocabulary, hidden, latent)

    def model(self, x: Tensor) -> None:
        """p(z) p(x | z) for a batch of sequences, int64 ``[batch, length]``."""
        pyro.module(f"{self.name}decoder", self.decoder)
        with pyro.plate("sequences", len(x)):
            zeros = self.decoder.to_symbols.weight.new_zeros(self.latent)
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            # The LSTM sees x alone, which no particles share out: it runs once for each row.
            symbols: Any = dist.Categorical(logits=self.decoder(z, x), validate_args=False)
            pyro.sample("x", symbols.to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x), a diagonal normal."""
        pyro.module(f"{self.name}encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("sequences", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class SequenceEncoder(nn.Module):
    """``outputs`` numbers from the last state of an LSTM over the embedded symbols.

    Maps int64 ``[rows, length]`` to ``[rows, outputs]``. PyTorch's initial values, but for the
    last layer: uniform weights after Glorot, zero biases.
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
