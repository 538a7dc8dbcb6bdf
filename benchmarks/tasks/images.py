"""Binary images, and a variational autoencoder of them: a plain Pyro model and guide."""

import argparse
import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from benchmarks.run import Settings, Task
from benchmarks.tasks.image_sets import load_images
from benchmarks.tasks.likelihoods import GreyLevels, LocationScale, likelihood
from benchmarks.tasks.pixelcnn import PixelCNN

# Rows that are not trained on, 400 of other sets; both sets of 14x14 have 50,000 to train on.
HELD_OUT = {"digits": 137, "digits-rotated": 548, "mnist-14": 10_000, "mnist-omniglot-14": 34_345}
VALIDATION = 1000  # of the rows held out, at most
DECODERS = ("mlp", "pixelcnn")
CHANNELS = 16  # of a PixelCNN


def sizes(dataset: str) -> dict[str, int]:
    """Return the widths of the networks."""
    small = dataset == "digits"
    return {"hidden": 100 if small else 200, "latent": 10 if small else 50}


def image_task(settings: Settings, options: argparse.Namespace, train_points: int = 1) -> Task:
    """Hold out validation rows, and draw once what is random in the rows to evaluate on."""
    found = load_images(settings.dataset, options.download)
    split = found.split_validation(HELD_OUT.get(settings.dataset, 400))
    pixels = likelihood(settings.likelihood, settings.dataset, split.train)

    def make_vae(name: str) -> VAE:
        sizes = settings.hidden, settings.latent
        if settings.decoder == "pixelcnn":
            return PixelVAE(split.train.mean(0).view(found.shape), *sizes, name=name)
        vae = VAE(split.train.mean(0), *sizes, name=name)
        if pixels.kind is not None:
            vae.decoder = LocationScale(vae.decoder, split.train, pixels.levels, pixels.kind)
        return vae

    return Task(
        train=split.train,
        validation=pixels.fixed(split.test[:VALIDATION], seed=1),
        test=pixels.fixed(found.test[: settings.eval_points], seed=3),
        make_vae=make_vae,
        transform=pixels.transform,
        train_sample=pixels.fixed(split.train[:train_points], seed=2),
    )


class VAE(nn.Module):
    """One stochastic layer, Bernoulli pixels, tanh networks with two hidden layers.

    The set-up of `Importance Weighted Autoencoders` (Burda et al., arXiv 1509.00519): uniform
    weights after Glorot, zero biases, and the logits of the mean training image as output bias.
    """

    def __init__(
        self, mean_image: Tensor, hidden: int = 200, latent: int = 50, name: str = ""
    ) -> None:
        super().__init__()
        self.name = name  # a prefix of its parameters in Pyro's store
        pixels = mean_image.numel()
        self.latent = latent
        self.prior: nn.Module | None = None  # builds p(z), where it is not the standard normal
        self.encoder = tanh_network(pixels, hidden, 2 * latent)
        network = tanh_network(latent, hidden, pixels)
        self.decoder: Any = network
        network[-1].bias = nn.Parameter(torch.logit(mean_image.clamp(0.001, 0.999)))

    def model(self, x: Tensor) -> None:
        """p(z) p(x | z) for a batch of images, ``[batch, pixels]``."""
        pyro.module(f"{self.name}decoder", self.decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", self._latents(x))
            pyro.sample("x", self._pixels(z, x).to_event(1), obs=x)

    def _pixels(self, z: Tensor, x: Tensor) -> Any:
        found = self.decoder(z)  # logits, or the distribution of grey pixels
        if isinstance(found, GreyLevels):
            return found
        return dist.Bernoulli(logits=found, validate_args=False)

    def _latents(self, x: Tensor) -> Any:
        if self.prior is None:
            return dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1)
        pyro.module(f"{self.name}prior", self.prior)
        return self.prior()

    def guide(self, x: Tensor) -> None:
        """q(z | x), a diagonal normal."""
        pyro.module(f"{self.name}encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("images", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class PixelVAE(VAE):
    """A VAE whose decoder sees the pixels before each, too: its density, of which nobody draws."""

    def __init__(self, mean_image: Tensor, hidden: int, latent: int, name: str = "") -> None:
        super().__init__(mean_image.flatten(), hidden, latent, name)
        of_latents = tanh_network(latent, hidden, CHANNELS * mean_image.numel())
        self.decoder = PixelCNN(of_latents, mean_image, CHANNELS)

    def _pixels(self, z: Tensor, x: Tensor) -> Any:
        return dist.Bernoulli(logits=self.decoder(z, x), validate_args=False)


def tanh_network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return a network with two hidden layers, with initial weights after Glorot."""
    layers = [nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)]
    for layer in layers:
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
