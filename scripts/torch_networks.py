"""The networks of the cases in PyTorch, as a user of it would write them.

Layers, parameters and initial distributions are those of `dgm_jax.models`; `forward` gives the loss
that they train, in nats per image where it is a likelihood's. One of several players has a list
`players` of modules, each of whose `forward` gives the loss of its own parameters.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    pixel_shuffle,
    pixel_unshuffle,
    scaled_dot_product_attention,
    silu,
    softplus,
)

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
    """h + conv(act(conv(act(h)))), between the two told a condition `[B, condition]`, if any."""

    def __init__(self, channels: int, width: int, condition: int = 0, act: Any = silu) -> None:
        """Make the layers."""
        super().__init__()
        self.first, self.second, self.act = _conv(channels, width), _conv(width, channels), act
        self.told = Modulated(condition, width) if condition else None

    def forward(self, h: Tensor, condition: Tensor | None = None) -> Tensor:
        """`[B, channels, H, W]` -> the same shape."""
        inner = self.first(self.act(h))
        if self.told is not None:
            inner = self.told(inner, condition)
        return h + self.second(self.act(inner))


class Modulated(nn.Module):
    """`h` `[B, C, H, W]` normalised, shifted and scaled as the condition `[B, E]` says."""

    def __init__(self, condition: int, channels: int) -> None:
        """Make the layer."""
        super().__init__()
        self.said = nn.Linear(condition, 2 * channels)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """The same shape."""
        shift, scale = self.said(silu(condition))[..., None, None].chunk(2, 1)
        return rms_norm(h, 1) * (1 + scale) + shift


class FlowMatching(nn.Module):
    """The U-Net of configs/flow_matching_mnist.py, and the loss it is trained by.

    Args:
      model: the `model` section of the config.
      images: float `[N, 784]`, of training, in [0, 1].
    """

    def __init__(self, model: Any, images: Tensor) -> None:
        """Start the layers as `dgm_jax.nn.denoisers` does."""
        super().__init__()
        self.model, self.patch = model, model.patch
        width, fine = model.channels[-1], model.channels[0]
        side = 28 // model.patch
        self.told = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.stem = _conv(model.patch**2, fine)
        self.place = nn.Parameter(0.02 * torch.randn(1, fine, side, side))
        self.net = UNet(model.channels, model.blocks, model.depth, model.heads, side)
        self.head = nn.Conv2d(fine, model.patch**2, 1)
        _start(self)
        for module in self.modules():
            if isinstance(module, Modulated | ConditionalBlock):
                nn.init.zeros_(module.said.weight)
        nn.init.zeros_(self.head.weight)
        self.register_buffer("frequencies", torch.logspace(0, math.log10(30), 16))
        self.register_buffer("mean", images.mean())
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """The loss `[]` for x `[B, 784]` in [0, 1]: of the velocity, mean over pixels."""
        x = 2 * (x - self.mean) + (torch.rand_like(x) - 0.5) / 127.5
        noise, normal = torch.randn_like(x), torch.randn(len(x), 1)
        t = torch.sigmoid(self.model.logit_mean + self.model.logit_std * normal)
        z, variance = (1 - t) * x + t * noise, self.model.sigma_data**2
        s = torch.sqrt((1 - t) ** 2 * variance + t**2)  # see `dgm_jax.nn.noise`
        skip, out = (t * (1 + variance) - variance) / s**2, self.model.sigma_data / s
        found = skip * z + out * self.answer(z / s, t)
        return (found - (noise - x)).square().mean()

    def answer(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's answer `[B, 784]` at x `[B, 784]` and times `[B, 1]`."""
        angles = t * self.frequencies
        condition = self.told(torch.cat([angles.cos(), angles.sin()], 1))
        image = x.reshape(-1, 1, 28, 28).contiguous(memory_format=torch.channels_last)
        h = self.net(self.stem(pixel_unshuffle(image, self.patch)) + self.place, condition)
        return pixel_shuffle(self.head(h), self.patch).flatten(1)


class UNet(nn.Module):
    """See `dgm_jax.nn.unet`; for squares of a side that can be halved."""

    def __init__(
        self, channels: tuple[int, ...], blocks: int, depth: int, heads: int, side: int
    ) -> None:
        """Make the stages."""
        super().__init__()
        width, coarse = channels[-1], side >> (len(channels) - 1)
        pairs = list(itertools.pairwise(channels))

        def stage(num: int) -> nn.ModuleList:
            return nn.ModuleList(ResidualBlock(num, num, width) for _ in range(blocks))

        self.down = nn.ModuleList(stage(num) for num in channels)
        self.up = nn.ModuleList(stage(num) for num in channels[-2::-1])
        self.coarsen = nn.ModuleList(_conv(fine, coarse, 2) for fine, coarse in pairs)
        self.refine = nn.ModuleList(nn.Conv2d(c, 4 * f, 1) for f, c in reversed(pairs))
        self.blocks = nn.ModuleList(ConditionalBlock(width, heads) for _ in range(depth))
        self.register_buffer("angles", rotary_angles((coarse, coarse), width // heads))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """`[B, channels[0], H, W]` -> the same shape, told a condition `[B, E]`."""
        seen = []
        for i, stage in enumerate(self.down):
            h = self.coarsen[i - 1](h) if i else h
            for block in stage:
                h = block(h, condition)
            seen.append(h)
        flat = seen.pop().flatten(2).transpose(1, 2)
        for block in self.blocks:
            flat = block(flat, self.angles, condition)
        h = flat.transpose(1, 2).reshape(h.shape).contiguous(memory_format=torch.channels_last)
        for refine, stage in zip(self.refine, self.up, strict=True):
            h = seen.pop() + pixel_shuffle(refine(h), 2)
            for block in stage:
                h = block(h, condition)
        return silu(h)


class Transformer(nn.Module):
    """The decoder-only Transformer of configs/transformer_shakespeare.py.

    Args:
      model: the `model` section of the config.
      tokens: int64 `[N, T]`, of training.
    """

    def __init__(self, model: Any, tokens: Tensor) -> None:
        """Start the layers as `dgm_jax.nn.autoregressive` does."""
        super().__init__()
        width = model.width
        self.blocks = nn.ModuleList(
            Block(width, model.heads, model.hidden) for _ in range(model.depth)
        )
        _start(self)
        for block in self.blocks:
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.feed_forward.out.weight)
        self.table = nn.Parameter(0.02 * torch.randn(int(tokens.max()) + 1, width))
        self.start = nn.Parameter(0.02 * torch.randn(1, width))
        self.register_buffer("angles", rotary_angles((tokens.shape[1],), width // model.heads))

    def forward(self, x: Tensor) -> Tensor:
        """The loss `[]` for tokens `[B, N]`, nats per sequence."""
        before = nn.functional.embedding(x[:, :-1], self.table)
        h = torch.cat([self.start.expand(len(x), 1, -1), before], 1)
        for block in self.blocks:
            h = block(h, self.angles)
        logits = nn.functional.linear(rms_norm(h), self.table)
        return cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="sum") / len(x)


class Block(nn.Module):
    """Causal attention and a feed-forward layer; see `dgm_jax.nn.attention.Block`."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        """Make both."""
        super().__init__()
        self.attention = Attention(width, heads, causal=True)
        self.feed_forward = FeedForward(width, hidden)

    def forward(self, h: Tensor, angles: Tensor) -> Tensor:
        """`[B, T, F]` -> the same shape."""
        h = h + self.attention(rms_norm(h), angles)
        return h + self.feed_forward(rms_norm(h))


class ConditionalBlock(nn.Module):
    """The same without a mask, told a condition `[B, F]`, for a hidden width of 3 F."""

    def __init__(self, width: int, heads: int) -> None:
        """Make both, and what says how they are shifted, scaled and gated."""
        super().__init__()
        self.attention = Attention(width, heads, causal=False)
        self.feed_forward = FeedForward(width, 3 * width)
        self.said = nn.Linear(width, 6 * width)

    def forward(self, h: Tensor, angles: Tensor, condition: Tensor) -> Tensor:
        """`[B, T, F]` -> the same shape."""
        said = self.said(silu(condition))[:, None].chunk(6, -1)
        h = h + said[2] * self.attention(rms_norm(h) * (1 + said[1]) + said[0], angles)
        return h + said[5] * self.feed_forward(rms_norm(h) * (1 + said[4]) + said[3])


class Attention(nn.Module):
    """With rotary positions; see `dgm_jax.nn.attention.Attention`."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        """Make the four matrices."""
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(self, h: Tensor, angles: Tensor) -> Tensor:
        """`[B, T, F]` -> the same shape; angles `[T, F / heads / 2]`."""
        each = (layer(h).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key))
        query, key = (rotate(one, angles).transpose(1, 2) for one in each)
        value = self.value(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU; see `dgm_jax.nn.attention.FeedForward`."""

    def __init__(self, width: int, hidden: int) -> None:
        """Make the three matrices."""
        super().__init__()
        self.gate, self.value = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """`[..., F]` -> the same shape."""
        return self.out(silu(self.gate(h)) * self.value(h))


def rms_norm(h: Tensor, axis: int = -1) -> Tensor:
    """`h` with a mean square of 1 along an axis."""
    return h * torch.rsqrt(h.square().mean(axis, keepdim=True) + 1e-6)


def rotary_angles(sides: tuple[int, ...], dim: int) -> Tensor:
    """By how much to turn each pair of numbers of a head: `[T, dim / 2]`."""
    pairs = dim // (2 * len(sides))
    frequencies = 10_000.0 ** (-torch.arange(pairs) / pairs)
    axes = torch.meshgrid(*(torch.arange(side) for side in sides), indexing="ij")
    return torch.cat([axis.reshape(-1, 1) * frequencies for axis in axes], 1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """`x` `[B, T, H, C]` turned by `angles` `[T, C / 2]`."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class GAN(nn.Module):
    """The relativistic GAN of configs/gan_mnist.py.

    Args:
      model: the `model` section of the config.
      images: float `[N, 784]`, of training, in [0, 1].
    """

    def __init__(self, model: Any, images: Tensor) -> None:
        """Start the layers as `dgm_jax.models.gan` does."""
        super().__init__()
        generator, discriminator = Generator(model), Discriminator(model)
        for network in (generator, discriminator):
            _start(network)
            network.to(memory_format=torch.channels_last)
        generator.bias.data = images.mean(0)
        self.players = nn.ModuleList(
            [
                DiscriminatorLoss(discriminator, generator, model.penalty_weight),
                GeneratorLoss(generator, discriminator),
            ]
        )


class Generator(nn.Module):
    """`dgm_jax.nn.conv.ConvDecoder` and a last layer; for images of 28 x 28 in [0, 1]."""

    def __init__(self, model: Any) -> None:
        """Make the stages."""
        super().__init__()
        self.latents, channels = model.latents, model.generator
        self.sides = [28]
        for _ in channels:
            self.sides.append(-(-self.sides[-1] // 2))
        self.first = nn.Linear(model.latents, self.sides[-1] ** 2 * channels[0])
        inputs = (channels[0], *channels[:-1])
        self.blocks = nn.ModuleList(
            ResidualBlock(i, o, act=torch.relu) for i, o in zip(inputs, channels, strict=True)
        )
        self.refine = nn.ModuleList(
            nn.Conv2d(i, 4 * o, 1) for i, o in zip(inputs, channels, strict=True)
        )
        self.head = nn.Conv2d(channels[-1], 1, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(784))

    def forward(self, num: int) -> Tensor:
        """`num` images `[num, 784]`."""
        side = self.sides[-1]
        h = self.first(torch.randn(num, self.latents)).reshape(num, side, side, -1)
        h = h.permute(0, 3, 1, 2)
        for block, refine, side in zip(self.blocks, self.refine, self.sides[-2::-1], strict=True):
            h = pixel_shuffle(refine(block(h)), 2)[..., :side, :side]
        return self.head(torch.relu(h)).flatten(1) + self.bias


class Discriminator(nn.Module):
    """`dgm_jax.nn.conv.ConvEncoder` and a last layer without a bias."""

    def __init__(self, model: Any) -> None:
        """Make the stages."""
        super().__init__()
        channels, side = model.discriminator, 28
        for _ in channels:
            side = -(-side // 2)
        inputs = (1, *channels[:-1])
        self.coarsen = nn.ModuleList(_conv(i, o, 2) for i, o in zip(inputs, channels, strict=True))
        self.blocks = nn.ModuleList(ResidualBlock(c, c, act=torch.relu) for c in channels)
        self.head = nn.Linear(side**2 * channels[-1], 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B]` of images `[B, 784]` in [0, 1]."""
        h = 2 * x.reshape(-1, 1, 28, 28).contiguous(memory_format=torch.channels_last) - 1
        for coarsen, block in zip(self.coarsen, self.blocks, strict=True):
            h = block(coarsen(h))
        return self.head(torch.relu(h).flatten(1))[:, 0]


class DiscriminatorLoss(nn.Module):
    """The relativistic loss with R1 and R2."""

    def __init__(self, discriminator: Discriminator, generator: Generator, weight: float) -> None:
        """Only the discriminator's parameters are this player's."""
        super().__init__()
        self.discriminator, self.other, self.weight = discriminator, [generator], weight

    def forward(self, real: Tensor) -> Tensor:
        """The loss `[]` against images `[B, 784]` in [0, 1]."""
        with torch.no_grad():
            fake = self.other[0](len(real))
        pair = real.detach().requires_grad_(), fake.requires_grad_()
        logits = [self.discriminator(x) for x in pair]
        slopes = torch.autograd.grad(sum(one.sum() for one in logits), pair, create_graph=True)
        squared = sum(slope.square().sum(1) for slope in slopes)
        return (softplus(logits[1] - logits[0]) + self.weight * squared / 2).mean()


class GeneratorLoss(nn.Module):
    """The same pairing, the other way round."""

    def __init__(self, generator: Generator, discriminator: Discriminator) -> None:
        """Only the generator's parameters are this player's."""
        super().__init__()
        self.generator, self.other = generator, [discriminator]

    def forward(self, real: Tensor) -> Tensor:
        """The loss `[]` against images `[B, 784]` in [0, 1]."""
        (discriminator,) = self.other
        with torch.no_grad():
            scored = discriminator(real)
        return softplus(scored - discriminator(self.generator(len(real)))).mean()


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


def _start(network: nn.Module) -> None:
    """Weights of variance 1 / fan-in and biases of 0, as Flax starts its layers; blocks add 0."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.second.weight)


def _logit(mean: Tensor) -> Tensor:
    """The best constant model's logits."""
    return torch.logit(mean.clamp(1e-3, 1 - 1e-3))


def _cost(logits: Tensor, x: Tensor) -> Tensor:
    """-log p(x | z) `[...]`, nats, for logits `[..., 784]`."""
    x = x.expand_as(logits)
    return binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
