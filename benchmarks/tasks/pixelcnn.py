"""A decoder of binary images that draws their pixels one after another, in raster order."""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d


class MaskedConv2d(nn.Conv2d):
    """A convolution of which an output sees those inputs in its window that are before its place.

    That is in raster order. It sees the input at its own place, too, if ``own``: not in the first
    layer, whose input is the image itself.
    """

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, size: int, own: bool) -> None:
        super().__init__(inputs, outputs, size, padding=size // 2)
        mask = torch.zeros(size * size)
        mask[: size * size // 2 + own] = 1.0
        self.register_buffer("mask", mask.view(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class PixelCNN(nn.Module):
    """Logits of p(x_i | earlier pixels, z) for all pixels i at once, by masked convolutions.

    The three layers reach five rows up and five columns to each side; of the earlier pixels there,
    some at the upper right are not seen, as masks of a square window leave a blind spot.
    ``of_latents`` maps z to numbers that are added to all maps of the first layer, ``[..., rows,
    channels * height * width]``. The output bias starts at the logits of ``mean_image``,
    ``[height, width]``.

    References: `Conditional Image Generation with PixelCNN Decoders` (van den Oord et al., arXiv
    1606.05328), `PixelVAE` (Gulrajani et al., arXiv 1611.05013).
    """

    def __init__(self, of_latents: nn.Module, mean_image: Tensor, channels: int) -> None:
        super().__init__()
        self.of_latents, self.shape = of_latents, (channels, *mean_image.shape)
        self.first = MaskedConv2d(1, channels, 7, own=False)
        self.more = nn.ModuleList(MaskedConv2d(channels, channels, 3, own=True) for _ in range(2))
        self.last = nn.Conv2d(channels, 1, 1, bias=False)
        self.bias = nn.Parameter(torch.logit(mean_image.clamp(0.001, 0.999)))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return logits ``[..., rows, pixels]`` for latents ``[..., rows, dims]`` and images."""
        latents = self.of_latents(z).unflatten(-1, self.shape)
        images = self.first(x.reshape(-1, 1, *self.shape[1:]))  # [rows, channels, height, width]
        maps = (latents + images).flatten(0, -4)  # without dimensions of particles
        for layer in self.more:
            maps = maps + layer(maps.relu())
        return (self.last(maps.relu())[:, 0] + self.bias).view(*latents.shape[:-3], -1)
