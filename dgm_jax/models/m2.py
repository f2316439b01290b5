"""Semi-supervised learning with a generative model: few labels, many images.

    p(x, y, z) = p(y) p(z) p(x | y, z),   q(y, z | x) = q(y | x) q(z | x, y)

with y one of C classes, uniform a priori, summed over wherever an example has no label.

Reference: Kingma et al. 2014, "Semi-supervised Learning with Deep Generative Models", model M2.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import checks, labels, likelihoods
from dgm_jax.core import (
    Aux,
    Batch,
    DataSpec,
    Labelled,
    Model,
    Params,
    Player,
    UserError,
    masked_mean,
)
from dgm_jax.distributions import gaussian_kl_to_standard, standard_gaussian_log_prob
from dgm_jax.nn import networks
from dgm_jax.nn.posteriors import Diagonal
from dgm_jax.nn.precision import Dense

LEARNS_FROM_FEW_LABELS = True


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's fields. Real numbers may be traced.

    Attributes:
      alpha: weight of the classifier's mean cost on the labelled examples, of which
        `data.labelled` says how many there are.
      beta: weight of the rate, of y and z; 1 gives a bound on log p(x).
      latents: L, dimensions of z.
      network: `mlp` or `conv`.
      classifier: widths of the hidden layers of q(y | x), or channels of its stages.
      encoder: the same of q(z | x, y).
      decoder: the same of p(x | y, z).
      activation: one of `nn.mlp.ACTIVATIONS`, or for an `mlp` also `gated`.
      likelihood: one of `likelihoods.LIKELIHOODS`.
    """

    alpha: float = 0.1
    beta: float = 1.0
    latents: int = 50
    network: str = "mlp"
    classifier: tuple[int, ...] = (500,)
    encoder: tuple[int, ...] = (500,)
    decoder: tuple[int, ...] = (500,)
    activation: str = "silu"
    likelihood: str = "bernoulli"


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    if spec.num_classes < 2:
        raise UserError("model.name='m2' needs data with labels of two classes or more")
    checks.at_least(config, latents=1, alpha=0, beta=0)
    checks.widths(config, "classifier", "encoder", "decoder")
    networks.check(config.network, config.activation, spec)
    likelihoods.check(config.likelihood, spec)


class Net(nn.Module):
    """q(y | x), q(z | x, y) and p(x | y, z)."""

    config: Config
    spec: DataSpec

    def setup(self) -> None:
        """The three networks."""
        config, spec = self.config, self.spec
        layers = (config.network, config.activation)
        self.classifier = networks.Encoder(layers[0], config.classifier, layers[1])
        self.logits = Dense(spec.num_classes)
        self.encoder = networks.Encoder(layers[0], config.encoder, layers[1])
        self.posterior = Diagonal(config.latents)
        self.decoder = networks.Decoder(
            layers[0], config.decoder, layers[1], config.likelihood, spec
        )

    def __call__(self, x: jax.Array) -> None:
        """Touch every parameter, for initialisation."""
        label = jnp.zeros(len(x), jnp.int32)
        self.classify(x)
        self.outputs(self.context(x, label)[0], label)

    def classify(self, x: jax.Array) -> jax.Array:
        """log q(y | x) `[B, C]` for x as the data hold it."""
        return nn.log_softmax(self.logits(self.classifier(x / self.spec.scale)))

    def context(self, x: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(mu, log_sigma) of q(z | x, y), each `[B, L]`."""
        return self.posterior(self.encoder(x / self.spec.scale, self._one_hot(label)))

    def outputs(self, z: jax.Array, label: jax.Array) -> jax.Array:
        """The likelihood's parameters `[..., B, D, P]` given z `[..., B, L]` and y `[B]`."""
        return self.decoder(z, self._one_hot(label))

    def _one_hot(self, label: jax.Array) -> jax.Array:
        return jax.nn.one_hot(label, self.spec.num_classes)


def build(config: Config, spec: DataSpec) -> Model:
    """M2 as pure functions; see `core.Model` for their contracts."""
    net, num_classes = Net(config, spec), spec.num_classes
    likelihood = likelihoods.LIKELIHOODS[config.likelihood]()
    labelled = spec.labelled or Labelled(spec.num_examples, 1.0)
    part = labelled.num / spec.num_examples
    # A batch's rows to the mean over all training examples, however many of them are labelled.
    weight_told, weight_others = part / labelled.share, (1 - part) / max(1 - labelled.share, 1e-9)

    def bind(params: Params) -> Net:
        return net.bind({"params": params["m2"]})

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        return {"m2": net.init(rng, batch["x"][:1])["params"]}

    def terms_given_label(
        bound: Net, x: jax.Array, label: jax.Array, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Distortion and the rate of z, were `label` `[B]` the class; each `[B]`."""
        context = bound.context(x, label)
        z, _ = bound.posterior.draw(context, rng, 1)
        flat = x.reshape(len(x), -1)
        distortion = -likelihood.log_prob(bound.outputs(z[0], label), flat)
        return distortion, jnp.sum(gaussian_kl_to_standard(*context), axis=-1)

    def every_label(
        bound: Net, x: jax.Array, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """log q(y | x), and distortion and rate of z given each y; each `[B, C]`."""

        def given(label: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            return terms_given_label(bound, x, jnp.full(len(x), label), key)

        keys = jax.random.split(rng, num_classes)
        distortion, rate = jax.vmap(given, out_axes=1)(jnp.arange(num_classes), keys)
        return bound.classify(x), distortion, rate

    def unlabelled_terms(
        log_q: jax.Array, distortion: jax.Array, rate: jax.Array
    ) -> dict[str, jax.Array]:
        """The ELBO's terms with y summed over (eq. 7): KL(q(y | x) ‖ p(y)) is part of the rate."""
        q = jnp.exp(log_q)
        return {
            "distortion": jnp.sum(q * distortion, axis=1),
            "rate": jnp.sum(q * (rate + log_q + math.log(num_classes)), axis=1),
        }

    def loss_fn(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Eqs. 6 to 9, per example of the whole training split, with the rate weighed by beta.

        Eq. 9 has alpha times the sum over the labelled examples; here it is times their mean.
        """
        log_q, distortion, rate = every_label(bind(params), batch["x"], rng)
        own = jax.nn.one_hot(batch["label"], num_classes)  # zeros where it is not told
        classification = -jnp.sum(own * log_q, axis=1)
        rate_at_label = jnp.sum(own * rate, axis=1) + math.log(num_classes)
        told = weight_told * (jnp.sum(own * distortion, axis=1) + config.beta * rate_at_label)
        told += config.alpha / labelled.share * classification
        terms = unlabelled_terms(log_q, distortion, rate)
        others = weight_others * (terms["distortion"] + config.beta * terms["rate"])
        cost = jnp.where(batch["label"] >= 0, told, others)
        # Zero in other rows: the mean over a batch is that over the rows whose label is told.
        terms["classification"] = classification / labelled.share
        return masked_mean(cost, batch), Aux(terms)

    def held_out_terms(params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        values = every_label(bind(params), batch["x"], rng)
        own = jax.nn.one_hot(batch["label"], num_classes)
        return unlabelled_terms(*values) | {"classification": -jnp.sum(own * values[0], axis=1)}

    def elbo(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        return -sum(unlabelled_terms(*every_label(bind(params), batch["x"], rng)).values())

    def log_weight(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        bound, x = bind(params), batch["x"]
        label_rng, z_rng = jax.random.split(rng)
        log_q = bound.classify(x)
        label = jax.random.categorical(label_rng, log_q)
        z, log_q_z = bound.posterior.draw(bound.context(x, label), z_rng, 1)
        log_likelihood = likelihood.log_prob(bound.outputs(z[0], label), x.reshape(len(x), -1))
        log_prior = jnp.sum(standard_gaussian_log_prob(z[0]), axis=-1) - math.log(num_classes)
        log_q_y = jnp.take_along_axis(log_q, label[:, None], axis=1)[:, 0]
        return log_likelihood + log_prior - log_q_z[0] - log_q_y

    def classify(params: Params, batch: Batch) -> jax.Array:
        return bind(params).classify(batch["x"])

    def encode(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        """q(y | x), and the mean of z under the most probable class."""
        del rng
        bound, log_q = bind(params), classify(params, batch)
        mu, _ = bound.context(batch["x"], jnp.argmax(log_q, axis=1))
        return jnp.concatenate([jnp.exp(log_q), mu], axis=1)

    def reconstruct(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        bound, label = bind(params), jnp.argmax(classify(params, batch), axis=1)
        z, _ = bound.posterior.draw(bound.context(batch["x"], label), rng, 1)
        return likelihoods.picture(likelihood, bound.outputs(z[0], label), spec)

    def sample(
        params: Params, rng: jax.Array, num: int, label: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        z_rng, x_rng = jax.random.split(rng)
        told = labels.of_samples(num, label, conditional=True, spec=spec)
        z = jax.random.normal(z_rng, (num, config.latents))
        outputs = bind(params).outputs(z, told["label"])
        return likelihoods.draw(likelihood, x_rng, outputs, spec) | told

    return Model(
        init=init,
        players=(Player("m2", loss_fn, held_out_terms),),
        log_likelihood_fns={"elbo": elbo},
        log_weight=log_weight,
        classify=classify,
        sample=sample,
        samples_have_label=True,
        encode=encode,
        reconstruct=reconstruct,
    )
