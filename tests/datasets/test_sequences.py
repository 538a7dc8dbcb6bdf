"""Sequences: draws against their exact log p(x), and a VAE with the same decoder."""

import itertools
import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from benchmarks.tasks.sequences import SequenceVAE
from pyro_recursive import IWAE_ELBO, AmortizedGuide, fit, log_marginal
from pyro_recursive.datasets import (
    SequenceDecoder,
    Sequences,
    lstm_sequences,
    sequence_evidence,
)
from tests.oracles.quadrature import normal_grid


def tiny(
    rows: int = 10, *, length: int = 3, vocabulary: int = 3, gain: float = 4.0, seed: int = 0
) -> Sequences:
    return lstm_sequences(
        rows,
        test_rows=10,
        length=length,
        vocabulary=vocabulary,
        hidden=6,
        gain=gain,
        seed=seed,
        dtype=torch.float64,
    )


def all_sequences(vocabulary: int, length: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))


# The exact evidence


def log_prob_by_hand(decoder: SequenceDecoder, z: Tensor, row: list[int]) -> Tensor:
    """Return log p(x | z) of one sequence for latents ``[n, 2]``, from the LSTM's equations."""
    p = dict(decoder.named_parameters())
    hidden = p["from_state.weight"].shape[0]
    state, cell, total = torch.zeros(hidden), torch.zeros(hidden), torch.zeros(len(z))
    for before, symbol in zip([decoder.vocabulary, *row[:-1]], row, strict=True):
        gates = p["lstm.weight_ih_l0"] @ p["embedding.weight"][before] + p["lstm.bias_ih_l0"]
        gates = gates + p["lstm.weight_hh_l0"] @ state + p["lstm.bias_hh_l0"]
        enter, forget, new, out = gates.chunk(4)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        state = out.sigmoid() * cell.tanh()
        both = torch.cat([state.expand(len(z), -1), z], 1)
        weight = torch.cat([p["from_state.weight"], p["from_latents.weight"]], 1)
        layer = torch.tanh(both @ weight.T + p["from_state.bias"])
        logits = layer @ p["to_symbols.weight"].T + p["to_symbols.bias"]
        total = total + logits.log_softmax(-1)[:, symbol]
    return total


@pytest.mark.parametrize("true", [True, False], ids=["true decoder", "initial decoder"])
def test_evidence_is_that_of_another_rule(true: bool) -> None:
    # Gauss-Hermite nodes, of which these are enough for a low gain; and the LSTM written out.
    data = tiny(length=4, vocabulary=5, gain=1.0)
    decoder = data.decoder if true else SequenceDecoder(5, 6)
    eps, weight = normal_grid(2, nodes=120)
    expected = [
        torch.logsumexp(log_prob_by_hand(decoder, eps.T, row) + weight.log(), 0)
        for row in data.test.tolist()
    ]
    found = sequence_evidence(decoder, data.test)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=2e-6)


def test_all_sequences_have_probability_one() -> None:
    for decoder in (tiny(vocabulary=3, length=4).decoder, SequenceDecoder(3, 5, latent=1)):
        evidence = sequence_evidence(decoder, all_sequences(3, 4))
        assert abs(evidence.exp().sum().item() - 1) < 1e-10


def test_chunks_single_precision_and_no_rows() -> None:
    data, evidence = tiny(), partial(sequence_evidence, nodes=41)
    expected = evidence(data.decoder, data.test)
    for chunk_size in (7, 10, 11):
        found = evidence(data.decoder, data.test, chunk_size=chunk_size)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    single = SequenceDecoder(3, 6, dtype=torch.float32)
    single.load_state_dict(data.decoder.state_dict())
    found = evidence(single, data.test)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert evidence(single, data.test[:0]).shape == (0,)


@pytest.mark.slow
def test_evidence_is_as_accurate_as_stated_at_the_default_sizes() -> None:
    data = lstm_sequences(1, test_rows=3, dtype=torch.float64)
    single = lstm_sequences(1, test_rows=3)
    expected = sequence_evidence(data.decoder, data.test, nodes=161, bound=8.0)
    for decoder, nodes, error in (
        (data.decoder, 121, 1e-6),
        (single.decoder, 121, 1e-5),
        (single.decoder, 61, 1e-2),
    ):
        found = sequence_evidence(decoder, data.test, nodes=nodes)
        torch.testing.assert_close(found, expected, rtol=0, atol=error)


# The draws


def chi_squared_score(counts: Tensor, probabilities: Tensor) -> float:
    """Return Pearson's statistic in standard deviations from its mean, if all is as it should be.

    Its mean is n - 1, and its variance ``2 (n - 1) + (sum 1/p - n**2 - 2 n + 2) / draws``.
    """
    n, draws = len(counts), counts.sum()
    expected = draws * probabilities
    statistic = ((counts - expected) ** 2 / expected).sum()
    variance = 2 * (n - 1) + ((1 / probabilities).sum() - n**2 - 2 * n + 2) / draws
    return ((statistic - (n - 1)) / variance.sqrt()).item()


def test_sequences_come_as_often_as_they_should() -> None:
    data = tiny(40_000, length=3, vocabulary=3)
    probabilities = sequence_evidence(data.decoder, all_sequences(3, 3)).exp()
    counts = (data.train @ torch.tensor([9, 3, 1])).bincount(minlength=27)
    assert abs(chi_squared_score(counts, probabilities)) < 4
    assert chi_squared_score(counts, probabilities.roll(1)) > 100


def likelihood_score(decoder: SequenceDecoder, z: Tensor, x: Tensor) -> float:
    """Return the mean of log p(x | z) in standard deviations from what it is for ``x ~ p(x | z)``.

    Mean and variance given z are sums over all sequences.
    """
    every = all_sequences(decoder.vocabulary, x.shape[1])
    log_p = decoder.log_prob(z[:, None], every)
    mean = (log_p.exp() * log_p).sum(1)
    variance = (log_p.exp() * log_p**2).sum(1) - mean**2
    return ((decoder.log_prob(z, x) - mean).sum() / variance.sum().sqrt()).item()


def test_latents_are_those_of_the_sequences() -> None:
    data = tiny(4000)
    assert data.train_latents.mean(0).abs().max() < 4 / math.sqrt(4000)
    assert (data.train_latents.var(0) - 1).abs().max() < 4 * math.sqrt(2 / 4000)
    for z, x in ((data.train_latents, data.train), (data.test_latents, data.test)):
        assert abs(likelihood_score(data.decoder, z, x)) < 4
    assert abs(likelihood_score(data.decoder, data.train_latents.roll(1, 0), data.train)) > 20


@pytest.mark.slow
def test_latents_matter_at_the_default_sizes() -> None:
    data = lstm_sequences(1, test_rows=50)
    log_p = sequence_evidence(data.decoder, data.test, nodes=61)
    information = data.decoder.log_prob(data.test_latents, data.test) - log_p
    error = information.std() / math.sqrt(50)
    assert information.mean() - 4 * error > 1.5 and abs(information.mean() - 2.65) < 4 * error


def test_the_same_seed_gives_the_same_sequences() -> None:
    state = torch.get_rng_state()
    first, second, other = tiny(), tiny(), tiny(seed=1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.manual_seed(99)
    for again in (second, tiny()):
        for name in ("train", "test", "train_latents", "test_latents"):
            assert torch.equal(getattr(again, name), getattr(first, name))
        theirs = again.decoder.state_dict()
        assert all(torch.equal(p, theirs[name]) for name, p in first.decoder.state_dict().items())
    assert not torch.equal(other.train, first.train)
    assert torch.equal(tiny(50).test, first.test), "the test rows do not depend on the others"


def test_sizes_dtypes_and_names() -> None:
    data = lstm_sequences(7, test_rows=3, length=4, vocabulary=6, hidden=5)
    assert data.train.shape == (7, 4) and data.test.shape == (3, 4) and data.vocabulary == 6
    assert data.train.dtype == data.test.dtype == torch.int64
    for tensor in (data.train_latents, data.test_latents, *data.decoder.parameters()):
        assert tensor.dtype == torch.float32 and not tensor.requires_grad
    double = lstm_sequences(7, test_rows=3, length=4, vocabulary=6, hidden=5, dtype=torch.float64)
    assert torch.equal(double.train, data.train), "the dtype is of what is returned"
    assert repr(data) == "Sequences(train=[7, 4], test=[3, 4], vocabulary=6)"


# The decoder


def test_many_latents_a_row_are_as_each_of_them() -> None:
    decoder, x = SequenceDecoder(5, 6), torch.randint(5, (3, 4))
    z = torch.randn(7, 2, 3, 2)
    each = torch.stack([torch.stack([decoder(inner, x) for inner in outer]) for outer in z])
    torch.testing.assert_close(decoder(z, x), each)
    log_prob = dist.Categorical(logits=each).log_prob(x).sum(-1)
    torch.testing.assert_close(decoder.log_prob(z, x), log_prob)


# The VAE of the benchmarks


def small_vae(x: Tensor) -> tuple[SequenceVAE, AmortizedGuide]:
    vae = SequenceVAE(vocabulary=6, hidden=8)
    guide = AmortizedGuide(vae.model, vae.encoder)
    guide(x)
    return vae, guide


def test_lstms_run_once_a_row_and_every_parameter_learns() -> None:
    data = tiny(20, vocabulary=6)
    vae, guide = small_vae(data.train)
    seen = []
    for lstm in (vae.encoder.lstm, vae.decoder.lstm):
        lstm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    IWAE_ELBO(16, estimator="dreg").differentiable_loss(vae.model, guide, data.train).backward()
    assert set(seen) == {(20, 3, 8)}, "without the particles"
    assert all(p.grad is not None and (p.grad != 0).any() for p in vae.parameters())


@pytest.mark.parametrize("of", ["AmortizedGuide", "VAE"])
def test_log_marginal_of_the_vae_is_its_evidence(of: str) -> None:
    data = tiny(20, vocabulary=6)
    vae, guide = small_vae(data.train)
    guide = guide if of == "AmortizedGuide" else vae.guide
    found = log_marginal(vae.model, guide, data.test, num_particles=20_000, diagnostics=True)
    exact = sequence_evidence(vae.decoder, data.test)
    assert ((found.log_marginal - exact) / found.standard_error).abs().max() < 4
    assert found.ess.min() > 100 and found.standard_error.median() < 0.05


@pytest.mark.slow
def test_the_vae_learns_the_true_model() -> None:
    data = tiny(2000, vocabulary=6, length=3)
    vae, guide = small_vae(data.train)
    before = sequence_evidence(vae.decoder, data.train[:200]).mean()
    fit(
        vae.model,
        guide,
        data.train,
        loss=IWAE_ELBO(8),
        epochs=10,
        batch_size=50,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        progress=False,
    )
    after = sequence_evidence(vae.decoder, data.train[:200])
    true = sequence_evidence(data.decoder, data.train[:200])
    gap = true - after
    assert abs(gap.mean()) < 0.15 < (true.mean() - before) / 2
