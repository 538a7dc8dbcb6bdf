"""An LSTM over the symbols, and a network that mixes its states with latents: p(x | z)."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SequenceDecoder"]


class SequenceDecoder(nn.Module):
    """Logits of the next symbol from a single-layer LSTM and a network over ``[h_t, z]``.

    ``h_t = LSTM(h_{t-1}, embedding(x_{t-1}))`` with a start symbol of its own in place of ``x_0``,
    and ``p(x_t | x_{<t}, z) = softmax(W tanh(A h_t + B z + b) + c)``: one hidden layer over the
    concatenation of ``h_t`` and ``z``, as wide as the LSTM. Latents enter here alone, so that the
    LSTM runs once for each row of ``x``, however many latents a row has.

    Parameters start as PyTorch's do, but for the network: uniform weights after Glorot, zero
    biases.

    Arguments:
        vocabulary: the number of symbols, V; they are 0, ..., V - 1.
        hidden: the size of embeddings, of the LSTM's state and of the hidden layer.
        latent: the length of ``z``.
        dtype, device: of the parameters, as in PyTorch's modules.

    In the manner of the synthetic data of `Semi-Amortized Variational Autoencoders` (Kim et al.,
    arXiv 1802.02550); sizes and the hidden layer are our choice.

    >>> decoder = SequenceDecoder(vocabulary=7, hidden=4)
    >>> x = torch.tensor([[3, 1, 4], [1, 5, 6]])
    >>> decoder(torch.randn(10, 2, 2), x).shape  # ten latents for each of two rows
    torch.Size([10, 2, 3, 7])
    """

    def __init__(
        self,
        vocabulary: int,
        hidden: int = 100,
        latent: int = 2,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        self.vocabulary, self.latent = vocabulary, latent
        self.embedding = nn.Embedding(vocabulary + 1, hidden, **place)  # the last one is the start
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True, **place)
        self.from_state = nn.Linear(hidden, hidden, **place)
        self.from_latents = nn.Linear(latent, hidden, bias=False, **place)
        self.to_symbols = nn.Linear(hidden, vocabulary, **place)
        for layer in (self.from_state, self.from_latents, self.to_symbols):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return logits ``[..., rows, length, V]`` for latents ``[..., rows, latent]``.

        ``x`` are integers ``[rows, length]``; the logits at t see those before t.
        """
        return self.logits(z, self.states(x))

    def states(self, x: Tensor) -> Tensor:
        """Return the LSTM's states ``[rows, length, hidden]`` before each symbol of ``x``."""
        before = torch.cat([x.new_full((len(x), 1), self.vocabulary), x[:, :-1]], 1)
        return self.lstm(self.embedding(before))[0]

    def logits(self, z: Tensor, states: Tensor) -> Tensor:
        """Return logits ``[..., rows, length, V]`` for states ``[rows, length, hidden]``."""
        layer = torch.tanh(self.from_state(states) + self.from_latents(z).unsqueeze(-2))
        return self.to_symbols(layer)

    def log_prob(self, z: Tensor, x: Tensor, states: Tensor | None = None) -> Tensor:
        """Return log p(x | z) in nats, ``[..., rows]``, from given ``states(x)`` if there are."""
        logits = self.logits(z, self.states(x) if states is None else states)
        symbols = x.expand(logits.shape[:-1]).unsqueeze(-1)
        return (logits.gather(-1, symbols).squeeze(-1) - logits.logsumexp(-1)).sum(-1)

    @torch.no_grad()
    def sample(self, z: Tensor, length: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw sequences, int64 ``[rows, length]``, for latents ``[rows, latent]``.

        The ``generator`` is of the parameters' device; torch's global one if not given.
        """
        symbol = torch.full((len(z), 1), self.vocabulary, device=z.device)
        state, drawn = None, []
        for _ in range(length):
            output, state = self.lstm(self.embedding(symbol), state)
            probabilities = self.logits(z, output).softmax(-1).squeeze(1)
            symbol = torch.multinomial(probabilities, 1, generator=generator)
            drawn.append(symbol)
        return torch.cat(drawn, 1)
