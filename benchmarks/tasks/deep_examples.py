"""Pyro's examples of deep generative models, small: what their networks learn is not the point.

Written from the models' mathematics, with synthetic data.
"""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from benchmarks.tasks.example import Example
from pyro_recursive import AmortizedGuide, RecursiveMixtureGuide, SemiAmortizedGuide

LATENT, HIDDEN = 3, 16
PARALLEL = {"enumerate": "parallel"}


def network(inputs: int, *outputs: int, normalize: bool = False) -> nn.Module:
    """Return a network with one hidden layer; with several outputs it returns all of them."""
    middle = nn.BatchNorm1d(HIDDEN) if normalize else nn.Identity()
    return Heads(nn.Sequential(nn.Linear(inputs, HIDDEN), middle, nn.Tanh()), *outputs)


class Heads(nn.Module):
    """Linear layers on one body."""

    def __init__(self, body: nn.Module, *outputs: int) -> None:
        super().__init__()
        self.body = body
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, size) for size in outputs)

    def forward(self, *inputs: Tensor) -> Any:
        shape = torch.broadcast_shapes(*(each.shape[:-1] for each in inputs))
        hidden = self.body(torch.cat([each.expand(*shape, -1) for each in inputs], -1))
        found = [head(hidden) for head in self.heads]
        return found[0] if len(found) == 1 else found


def binary(rows: int, columns: int) -> Tensor:
    """Return rows near one of two patterns."""
    generator = torch.Generator().manual_seed(0)
    chance = torch.where(torch.arange(columns) % 2 == torch.arange(rows)[:, None] % 2, 0.9, 0.1)
    return torch.bernoulli(chance, generator=generator)


def normal(loc: Tensor, raw_scale: Tensor) -> Any:
    """Return independent normals; softplus of the raw scales."""
    return dist.Normal(loc, softplus(raw_scale) + 1e-3).to_event(1)


def standard_normal(size: int) -> Any:
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)


def vae() -> Example:
    """A variational autoencoder."""
    x = binary(20, 12)
    decoder, encoder = network(LATENT, 12), network(12, LATENT, LATENT)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard_normal(LATENT))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def own(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(*encoder(x)))

    def amortized() -> AmortizedGuide:
        net = nn.Sequential(nn.Linear(12, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENT))
        return AmortizedGuide(model, net)

    guides = {
        "its own": lambda: own,
        "AmortizedGuide": amortized,
        "RecursiveMixtureGuide": lambda: RecursiveMixtureGuide(model, [amortized(), amortized()]),
        "SemiAmortizedGuide": lambda: SemiAmortizedGuide(model, amortized()),
    }
    return Example(model, guides, (x,))


def semi_supervised_vae(labelled: bool, enumerated: bool = False) -> Example:
    """A VAE whose latent class is observed in some minibatches; its plate has no size."""
    x = binary(20, 12)
    y = one_hot(torch.arange(20) % 2, 2).to(x)
    decoder, encoder_y, encoder_z = (
        network(LATENT + 2, 12),
        network(12, 2),
        network(14, LATENT, LATENT),
    )
    infer = PARALLEL if enumerated else {}

    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("ss_decoder", decoder)
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), LATENT), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(len(x), 2)), obs=y)
            pyro.sample("x", dist.Bernoulli(logits=decoder(z, y)).to_event(1), obs=x)

    def own(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("ss_encoder_y", encoder_y)
        pyro.module("ss_encoder_z", encoder_z)
        with pyro.plate("data"):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=encoder_y(x)), infer=infer)
            pyro.sample("z", normal(*encoder_z(x, y)))

    return Example(model, {"its own": lambda: own}, (x, y) if labelled else (x,))


def conditional_vae() -> Example:
    """A conditional VAE with a learned prior; its plate has no size."""
    whole = binary(20, 12)
    x, y = whole[:, :4], whole[:, 4:]
    prior, decoder = network(4, LATENT, LATENT), network(LATENT + 4, 8)
    recognition = network(12, LATENT, LATENT)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("cvae_prior", prior)
        pyro.module("cvae_decoder", decoder)
        with pyro.plate("data"):
            z = pyro.sample("z", normal(*prior(x)))
            pyro.sample("y", dist.Bernoulli(logits=decoder(z, x)).to_event(1), obs=y)

    def own(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("cvae_recognition", recognition)
        with pyro.plate("data"):
            pyro.sample("z", normal(*(prior(x) if y is None else recognition(x, y))))

    return Example(model, {"its own": lambda: own}, (x, y))


def deep_markov_model() -> Example:
    """A deep Markov model of sequences of unequal length, masked beyond their ends."""
    x = binary(40, 6).reshape(8, 5, 6)
    mask = torch.arange(5) < torch.tensor([5, 3, 5, 2, 4, 5, 1, 3])[:, None]
    transition, emitter = network(LATENT, LATENT, LATENT), network(LATENT, 6)
    memory, combiner = nn.GRU(6, HIDDEN, batch_first=True), network(HIDDEN + LATENT, LATENT, LATENT)

    def model(x: Tensor, mask: Tensor) -> None:
        pyro.module("dmm_transition", transition)
        pyro.module("dmm_emitter", emitter)
        with pyro.plate("sequences", len(x)):
            z = x.new_zeros(len(x), LATENT)
            for step in range(x.shape[1]):
                with poutine.mask(mask=mask[:, step]):
                    z = pyro.sample(f"z_{step}", normal(*transition(z)))
                    logits = emitter(z)
                    fn = dist.Bernoulli(logits=logits).to_event(1)
                    pyro.sample(f"x_{step}", fn, obs=x[:, step])

    def own(x: Tensor, mask: Tensor) -> None:
        pyro.module("dmm_memory", memory)
        pyro.module("dmm_combiner", combiner)
        states = memory(x.flip(1))[0].flip(1)
        with pyro.plate("sequences", len(x)):
            z = x.new_zeros(len(x), LATENT)
            for step in range(x.shape[1]):
                with poutine.mask(mask=mask[:, step]):
                    z = pyro.sample(f"z_{step}", normal(*combiner(states[:, step], z)))

    guides = {
        "its own": lambda: own,
        "AmortizedGuide": lambda: AmortizedGuide(
            model, nn.Linear(30, 2 * 5 * LATENT), inputs=lambda x, mask: x.flatten(1)
        ),
    }
    return Example(model, guides, (x, mask))


def attend_infer_repeat() -> Example:
    """Attend, infer, repeat: up to two objects at unknown places in each picture."""
    size, what = 6, 2
    x = torch.zeros(10, size, size)
    for row in range(10):
        x[row, row % 5 : row % 5 + 2, 1:3] = 1.0
    decoder = network(what, 4)
    encoder = network(size * size + 1, 1, 3, 3, what, what)

    def place(window: Tensor, where: Tensor) -> Tensor:
        """Put windows of 2 x 2 at a scale and a place: ``[*batch, 4]`` to ``[*batch, 6, 6]``."""
        scale = softplus(where[..., 0]) + 0.5
        rotation = torch.stack([scale, scale * 0], -1), torch.stack([scale * 0, scale], -1)
        matrix = torch.cat([torch.stack(rotation, -2), where[..., 1:, None]], -1)
        flat = matrix.reshape(-1, 2, 3)
        grid = nn.functional.affine_grid(flat, [len(flat), 1, size, size], align_corners=False)
        drawn = nn.functional.grid_sample(window.reshape(-1, 1, 2, 2), grid, align_corners=False)
        return drawn.reshape(*where.shape[:-1], size, size)

    def model(x: Tensor) -> None:
        pyro.module("air_decoder", decoder)
        with pyro.plate("pictures", len(x)):
            present, picture = x.new_ones(len(x)), torch.zeros_like(x)
            for step in range(2):
                present = pyro.sample(f"present_{step}", dist.Bernoulli(0.4 * present))
                where = pyro.sample(f"where_{step}", standard_normal(3).mask(present.bool()))
                z = pyro.sample(f"what_{step}", standard_normal(what).mask(present.bool()))
                picture = picture + present[..., None, None] * place(decoder(z).sigmoid(), where)
            pyro.sample("x", dist.Normal(picture, 0.3).to_event(2), obs=x)

    def own(x: Tensor) -> None:
        pyro.module("air_encoder", encoder)
        with pyro.plate("pictures", len(x)):
            present = x.new_ones(len(x))
            for step in range(2):
                logit, *rest = encoder(x.flatten(1), x.new_full((len(x), 1), float(step)))
                chance = logit[:, 0].sigmoid() * present
                present = pyro.sample(f"present_{step}", dist.Bernoulli(chance))
                where, z = normal(*rest[:2]), normal(*rest[2:])
                pyro.sample(f"where_{step}", where.mask(present.bool()))
                pyro.sample(f"what_{step}", z.mask(present.bool()))

    return Example(model, {"its own": lambda: own}, (x,))


def single_cells(labelled: bool, enumerated: bool = False) -> Example:
    """scANVI: counts of genes, a library size, two layers of latents, and types of cells."""
    counts = torch.poisson(3 * torch.rand(20, 10, generator=torch.Generator().manual_seed(0)))
    types = one_hot(torch.arange(20) % 2, 2).to(counts)
    decode_z, decode_x = network(LATENT + 2, LATENT, LATENT), network(LATENT, 10, 10)
    encode_x = network(10, LATENT, LATENT, 1, 1, normalize=True)
    encode_y, encode_z = network(LATENT, 2), network(LATENT + 2, LATENT, LATENT)
    infer = PARALLEL if enumerated else {}

    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("cells_z", decode_z)
        pyro.module("cells_x", decode_x)
        dispersion = pyro.param("dispersion", x.new_full((10,), 2.0)).exp()
        with pyro.plate("cells", len(x)), poutine.scale(scale=1 / len(x)):
            z2 = pyro.sample("z2", standard_normal(LATENT))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(2)), obs=y)
            z1 = pyro.sample("z1", normal(*decode_z(z2, y)))
            size = pyro.sample("size", dist.LogNormal(2.5, 0.5))
            gate, share = decode_x(z1)
            mean = size[..., None] * share.softmax(-1)
            logits = mean.log() - dispersion.log()
            fn = dist.ZeroInflatedNegativeBinomial(dispersion, logits=logits, gate_logits=gate)
            pyro.sample("x", fn.to_event(1), obs=x)

    def own(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("cells_encode_x", encode_x)
        pyro.module("cells_encode_y", encode_y)
        pyro.module("cells_encode_z", encode_z)
        with pyro.plate("cells", len(x)), poutine.scale(scale=1 / len(x)):
            loc, scale, size, size_scale = encode_x(x.log1p())
            z1 = pyro.sample("z1", normal(loc, scale))
            scale = softplus(size_scale[..., 0]) + 1e-3
            pyro.sample("size", dist.LogNormal(size[..., 0], scale))
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=encode_y(z1)), infer=infer)
            pyro.sample("z2", normal(*encode_z(z1, y)))

    return Example(model, {"its own": lambda: own}, (counts, types) if labelled else (counts,))


def causal_effects(classifiers: bool = False) -> Example:
    """CEVAE: a latent confounder of treatment and outcome.

    With classifiers the guide observes them as well, as in Pyro's own module, which has a loss of
    its own for that.
    """
    auxiliary = {"is_auxiliary": classifiers}
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(30, generator=generator)
    x = z[:, None] + torch.randn(30, 4, generator=generator)
    t = (z + torch.randn(30, generator=generator) > 0).to(x)
    y = z + t + 0.5 * torch.randn(30, generator=generator)
    features, treatment, outcome = network(LATENT, 4, 4), network(LATENT, 1), network(LATENT, 2, 2)
    guess_t, guess_y, encode = network(4, 1), network(5, 1, 1), network(6, LATENT, LATENT)

    def pick(both: Tensor, t: Tensor) -> Tensor:
        return torch.where(t > 0, both[..., 1], both[..., 0])

    def model(x: Tensor, t: Tensor | None = None, y: Tensor | None = None) -> None:
        for name, net in (("x", features), ("t", treatment), ("y", outcome)):
            pyro.module(f"cevae_{name}", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard_normal(LATENT))
            pyro.sample("x", normal(*features(z)), obs=x)
            t = pyro.sample("t", dist.Bernoulli(logits=treatment(z)[..., 0]), obs=t)
            loc, scale = (pick(each, t) for each in outcome(z))
            pyro.sample("y", dist.Normal(loc, softplus(scale) + 1e-3), obs=y)

    def own(x: Tensor, t: Tensor | None = None, y: Tensor | None = None) -> None:
        for name, net in (("guess_t", guess_t), ("guess_y", guess_y), ("encode", encode)):
            pyro.module(f"cevae_{name}", net)
        with pyro.plate("data", len(x)):
            if t is None or classifiers:
                fn: Any = dist.Bernoulli(logits=guess_t(x)[..., 0])
                t = pyro.sample("t", fn, obs=t, infer=auxiliary)
            if y is None or classifiers:
                loc, scale = guess_y(x, t[..., None])
                fn = dist.Normal(loc[..., 0], softplus(scale[..., 0]) + 1e-3)
                y = pyro.sample("y", fn, obs=y, infer=auxiliary)
            pyro.sample("z", normal(*encode(x, t[..., None], y[..., None])))

    return Example(model, {"its own": lambda: own}, (x, t, y))


EXAMPLES: dict[str, Callable[[], Example]] = {
    "VAE": vae,
    "SS-VAE, labelled": lambda: semi_supervised_vae(labelled=True),
    "SS-VAE, unlabelled": lambda: semi_supervised_vae(labelled=False),
    "SS-VAE, enumerated": lambda: semi_supervised_vae(labelled=False, enumerated=True),
    "CVAE": conditional_vae,
    "DMM": deep_markov_model,
    "AIR": attend_infer_repeat,
    "scANVI, labelled": lambda: single_cells(labelled=True),
    "scANVI, unlabelled": lambda: single_cells(labelled=False),
    "scANVI, enumerated": lambda: single_cells(labelled=False, enumerated=True),
    "CEVAE": causal_effects,
    "CEVAE with classifiers": lambda: causal_effects(classifiers=True),
}
