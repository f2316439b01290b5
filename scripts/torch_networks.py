"""The networks of the cases in PyTorch, as a user of it would write them.

Layers, parameters and initial distributions are those of `dgm_jax.models.vae` and
`dgm_jax.models.topdown`; `forward` gives the loss that they train, in nats per image.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, pixel_shuffle, silu, softplus

ACTIVATIONS = {"silu": nn.SiLU, "relu": nn.ReLU}
_FLOOR = 1e-4  # of sigma
_UNIT_RAW = math.log(math.expm1(1 - _FLOOR))  # where sigma is 1


class MLPVAE(nn.Module):
    """784-hidden-latents-hidden-784, both Gaussians diagonal; IWAE's objective for K > 1.

    Args:
      hidden: widths of the encoder; the decoder's are the reverse.
      latents: L.
      num_samples: K.
      activation: one of `ACTIVATIONS`.
      mean: float `[784]`, of the training images in [0, 1].
    """

    def __init__(
        self, hidden: tuple[int, ...], latents: int, num_samples: int, activation: str, mean: Tensor
    ) -> None:
        """Start the layers as Flax does."""
        super().__init__()

        def mlp(*sizes: int) -> list[nn.Module]:
            pairs = itertools.pairwise(sizes)
            return [
                layer for i, o in pairs for layer in (nn.Linear(i, o), ACTIVATIONS[activation]())
            ]

        self.latents, self.num_samples = latents, num_samples
        self.encoder = nn.Sequential(*mlp(784, *hidden), nn.Linear(hidden[-1], 2 * latents))
        self.decoder = nn.Sequential(*mlp(latents, *hidden[::-1]), nn.Linear(hidden[0], 784))
        _start(self)
        self.decoder[-1].bias.data = _logit(mean)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | x), each `[B, L]`, for x `[B, 784]`."""
        mu, raw = self.encoder(2 * x - 1).chunk(2, -1)
        return mu, softplus(raw) + _FLOOR

    def log_weights(self, x: Tensor, noise: Tensor) -> Tensor:
        """log p(x, z) - log q(z | x) `[K, B]`, nats, at z drawn with `noise` `[K, B, L]`."""
        mu, sigma = self.posterior(x)
        z = mu + sigma * noise
        log_ratio = (0.5 * (noise**2 - z**2) + sigma.log()).sum(-1)
        return log_ratio - _cost(self.decoder(z), x)

    def forward(self, x: Tensor) -> Tensor:
        """The loss `[]` for x `[B, 784]` in {0, 1}."""
        if self.num_samples > 1:
            noise = torch.randn(self.num_samples, len(x), self.latents)
            log_w = self.log_weights(x, noise)
            return -(torch.logsumexp(log_w, 0) - math.log(self.num_samples)).mean()
        mu, sigma = self.posterior(x)
        cost = _cost(self.decoder(mu + sigma * torch.randn_like(sigma)), x)
        rate = (0.5 * (sigma**2 + mu**2 - 1) - sigma.log()).sum(-1)
        return (cost + rate).mean()


class TopDownVAE(nn.Module):
    """The convolutional hierarchy on images of 28 x 28, in `channels_last` memory.

    Args:
      layers: stochastic layers at each resolution, the image's own first.
      latents: channels of each z.
      channels: of the state and of the features.
      width: channels inside a block.
      mean: float `[784]`, of the training images in [0, 1].
    """

    def __init__(
        self, layers: tuple[int, ...], latents: int, channels: int, width: int, mean: Tensor
    ) -> None:
        """Start the layers as `dgm_jax.models.topdown` does."""
        super().__init__()
        halvings = len(layers) - 1
        self.stem = _conv(1, channels)
        # Zeros stand before the first row and column here, behind the last in Flax: the mirror
        # image of the same layer.
        self.down_sampling = nn.ModuleList(_conv(channels, channels, 2) for _ in range(halvings))
        self.up_blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(channels, width) for _ in range(num))) for num in layers
        )
        self.layers = nn.ModuleList(
            nn.ModuleList(Layer(latents, channels, width) for _ in range(num)) for num in layers
        )
        self.up_sampling = nn.ModuleList(
            nn.Conv2d(channels, 4 * channels, 1) for _ in range(halvings)
        )
        side = 28 >> halvings
        self.constant = nn.Parameter(torch.randn(1, channels, side, side))
        self.head = nn.Conv2d(channels, 1, 1, bias=False)
        self.bias = nn.Parameter(_logit(mean).reshape(1, 1, 28, 28))
        _start(self)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.second.weight)
            if isinstance(module, Layer):
                nn.init.zeros_(module.prior_head.weight)
                nn.init.zeros_(module.posterior_head.weight)
                module.from_z.weight.data *= sum(layers) ** -0.25
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """The loss `[]` for x `[B, 784]` in {0, 1}."""
        image = x.reshape(-1, 1, 28, 28).contiguous(memory_format=torch.channels_last)
        h, features = self.stem(2 * image - 1), []
        for i, blocks in enumerate(self.up_blocks):
            h = blocks(self.down_sampling[i - 1](h) if i else h)
            features.append(h)
        state, rate = self.constant.expand(len(x), -1, -1, -1), 0.0
        for i in reversed(range(len(features))):
            for layer in self.layers[i]:
                state, layer_rate = layer(state, features[i])
                rate = rate + layer_rate
            if i:
                state = pixel_shuffle(self.up_sampling[i - 1](state), 2)
        logits = self.head(silu(state)) + self.bias
        return (_cost(logits.flatten(1), x) + rate).mean()


class Layer(nn.Module):
    """One stochastic layer; see `dgm_jax.models.topdown.Layer`."""

    def __init__(self, latents: int, channels: int, width: int) -> None:
        """Make the layers of both Gaussians and of the way back from z."""
        super().__init__()
        self.split = (latents, latents, channels)
        self.prior_hidden = _conv(channels, width)
        self.prior_head = nn.Conv2d(width, sum(self.split), 1)
        self.posterior_hidden = _conv(2 * channels, width)
        self.posterior_head = nn.Conv2d(width, 2 * latents, 1)
        self.from_z = nn.Conv2d(latents, channels, 1)
        self.block = ResidualBlock(channels, width)

    def forward(self, state: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The state with z ~ q in it, and KL(q ‖ p) `[B]`."""
        prior = self.prior_head(silu(self.prior_hidden(silu(state))))
        mu, raw, change = prior.split(self.split, 1)
        both = silu(torch.cat([state, features], 1))
        shift, raw_factor = self.posterior_head(silu(self.posterior_hidden(both))).chunk(2, 1)
        sigma, factor = (softplus(r + _UNIT_RAW) + _FLOOR for r in (raw, raw_factor))
        z = mu + sigma * (shift + factor * torch.randn_like(factor))
        rate = 0.5 * (factor**2 + shift**2 - 1) - factor.log()
        return self.block(state + change + self.from_z(z)), rate.sum((1, 2, 3))


class ResidualBlock(nn.Module):
    """h + conv(silu(conv(silu(h))))."""

    def __init__(self, channels: int, width: int) -> None:
        """Make the two convolutions."""
        super().__init__()
        self.first, self.second = _conv(channels, width), _conv(width, channels)

    def forward(self, h: Tensor) -> Tensor:
        """`[B, channels, H, W]` -> the same shape."""
        return h + self.second(silu(self.first(silu(h))))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


def _start(network: nn.Module) -> None:
    """Weights of variance 1 / fan-in and biases of 0, as Flax starts its layers."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _logit(mean: Tensor) -> Tensor:
    """The best constant model's logits."""
    return torch.logit(mean.clamp(1e-3, 1 - 1e-3))


def _cost(logits: Tensor, x: Tensor) -> Tensor:
    """-log p(x | z) `[...]`, nats, for logits `[..., 784]`."""
    x = x.expand_as(logits)
    return binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
