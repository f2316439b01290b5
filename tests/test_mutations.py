"""The tests turned round: each mutant below is wrong mathematics, and some test must notice.

A job of its own, several minutes long: `python -m pytest -m mutation`. Every mutant is made by
text substitution in a temporary copy of the checkout, and the tests named beside it run there.
"""

import os
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest
from conftest import REPO


class Mutant(NamedTuple):
    """`old` becomes `new` in `dgm_jax/<file>`; `tests/<tests>` must fail."""

    file: str
    old: str
    new: str
    tests: str


DRAWS, OBJECTIVES, DISTRIBUTIONS = "draws.py", "objectives.py", "distributions.py"
GAN, MADE = "models/gan.py", "models/made.py"
QUALITY = "evaluators/quality.py"
ATTENTION, MASKED = "nn/attention.py", "models/masked_diffusion.py"
ENERGY = "models/energy.py"
VAE, HVAE, LATENT_VARIABLE = "models/vae.py", "models/hvae.py", "latent_variable.py"
PRIORS, POSTERIORS = ("nn/priors.py", "nn/posteriors.py")
BIJECTIONS, TRANSFORMS, FLOW = "nn/bijections.py", "nn/transforms.py", "models/flow.py"
DIFFUSION, MATCHING, MEAN_FLOW = (
    f"models/{name}.py" for name in ("diffusion", "flow_matching", "mean_flow")
)

MUTANTS = {
    # Sample quality.
    "a kernel distance with each point's own pair": Mutant(
        QUALITY, "(kernel.sum() - np.trace(kernel)) / (num * (num - 1))",
        "kernel.mean()", "evaluators/test_quality.py",
    ),
    "a Fréchet distance without its root": Mutant(
        QUALITY, "cross = np.sqrt(np.maximum(values, 0)).sum()", "cross = values.sum()",
        "evaluators/test_quality.py",
    ),
    "precision by the samples' reach": Mutant(
        QUALITY, "distances <= data_reach[:, narrow]", "distances <= reach",
        "evaluators/test_quality.py",
    ),
    "copying the other way round": Mutant(
        QUALITY, "mannwhitneyu(held_out, samples)", "mannwhitneyu(samples, held_out)",
        "evaluators/test_quality.py",
    ),
    # Diffusion, flow matching, mean flows.
    "twice the diffusion term": Mutant(
        DIFFUSION, "return 0.5 * rise * jnp.exp(-gamma)", "return rise * jnp.exp(-gamma)",
        "models/test_diffusion.py",
    ),
    "a bit blind to its own noisy value": Mutant(
        DIFFUSION, "out + usual + _log_odds(y, gamma)", "out + usual", "models/test_diffusion.py"
    ),
    "ancestral noise of the level before": Mutant(
        DIFFUSION, "+ new * jnp.sqrt(kept) * noise", "+ s * jnp.sqrt(kept) * noise",
        "models/test_diffusion.py",
    ),
    "a schedule moved by the cost": Mutant(
        DIFFUSION, 'stop_gradient(terms["diffusion"] ** 2)', 'stop_gradient(terms["diffusion"])',
        "models/test_diffusion.py",
    ),
    "the flow's divergence subtracted": Mutant(
        MATCHING, "axis=axes) + change", "axis=axes) - change", "models/test_flow_matching.py"
    ),
    "grey values without their unit": Mutant(
        MATCHING, "return found - spec.num_dims * math.log(denoisers.unit(spec))", "return found",
        "models/test_flow_matching.py",
    ),
    "noise in the inverse order": Mutant(
        MATCHING, "jnp.zeros_like(column).at[row].set(column)",
        "jnp.zeros_like(column).at[column].set(row)", "models/test_flow_matching.py",
    ),
    "an identity without its own time": Mutant(
        MEAN_FLOW, "jnp.zeros_like(r), jnp.ones_like(t)", "jnp.zeros_like(r), jnp.zeros_like(t)",
        "models/test_mean_flow.py",
    ),
    "guidance the wrong way": Mutant(
        "nn/denoisers.py", "return without + weight * (with_label - without)",
        "return with_label + weight * (without - with_label)", "nn/test_denoisers.py",
    ),
    # Pixel by pixel.
    "a PixelCNN that sees itself": Mutant(
        "nn/causal.py", "for j in range(1, reach + 1))", "for j in range(reach + 1))",
        "models/test_pixel_by_pixel.py",
    ),
    "a row that sees itself": Mutant(
        "nn/causal.py", "for i in range(1, reach + 1) for j", "for i in range(reach + 1) for j",
        "models/test_pixel_by_pixel.py",
    ),
    "rows drawn without what is above": Mutant(
        "models/pixelcnn.py", "seen, said[n][:, j], to_h)", "seen, 0 * said[n][:, j], to_h)",
        "models/test_pixel_by_pixel.py",
    ),
    "masks of the output not strict": Mutant(
        "nn/mlp.py", "before[:, None] < degrees[None]", "before[:, None] <= degrees[None]",
        "models/test_pixel_by_pixel.py",
    ),
    "draws in the order of the network": Mutant(
        MADE, "x[:, np.argsort(orders[i])]", "x", "models/test_pixel_by_pixel.py"
    ),
    "a loss of the mixture": Mutant(
        MADE, "jnp.mean(each_log_prob(params, batch), axis=0)", "log_prob(params, batch)",
        "models/test_pixel_by_pixel.py",
    ),
    "the sum of several orders": Mutant(
        MADE, "log_mean_exp(each_log_prob(params, batch))",
        "jax.nn.logsumexp(each_log_prob(params, batch), axis=0)", "models/test_pixel_by_pixel.py",
    ),
    "single draws of the first order": Mutant(
        MADE, "jax.random.permutation(shuffle, each * config.orders)",
        "jnp.arange(each * config.orders)", "models/test_pixel_by_pixel.py",
    ),
    # Objectives.
    "rate subtracted": Mutant(
        OBJECTIVES, "draws.distortion + options.beta * draws.total_rate",
        "draws.distortion - options.beta * draws.total_rate", "test_objectives.py",
    ),
    "mean over latents": Mutant(
        DRAWS, "return jnp.sum(self.rate, axis=-1)", "return jnp.mean(self.rate, axis=-1)",
        "test_objectives.py",
    ),
    "sum over draws": Mutant(
        DRAWS, "return -jnp.mean(self.log_likelihood, axis=0)",
        "return -jnp.sum(self.log_likelihood, axis=0)", "test_objectives.py",
    ),
    "posterior's sign in the weight": Mutant(
        DRAWS, "beta * (self.log_prior - self.log_posterior)",
        "beta * (self.log_prior + self.log_posterior)", "test_objectives.py",
    ),
    "no log K": Mutant(
        "distributions.py", " - math.log(values.shape[axis])", "", "test_objectives.py",
    ),
    "landing not stuck": Mutant(
        OBJECTIVES, "draws.log_posterior_at(draws.z, True)",
        "draws.log_posterior_at(draws.z, False)", "test_objectives.py",
    ),
    "singly reparameterised": Mutant(
        OBJECTIVES, "draws.log_weights_at(scaled,", "draws.log_weights_at(draws.z,",
        "test_objectives.py",
    ),
    "score term left in DReG": Mutant(
        OBJECTIVES, "options.beta, True), axis=0)", "options.beta, False), axis=0)",
        "test_objectives.py",
    ),
    "DReG blind to the rate's weight": Mutant(
        OBJECTIVES, "scale = 1 - options.beta + options.beta * weight", "scale = weight",
        "test_objectives.py",
    ),
    "weights not detached": Mutant(
        OBJECTIVES, "log_w = jax.lax.stop_gradient(draws.log_weights(options.beta))",
        "log_w = draws.log_weights(options.beta)", "test_objectives.py",
    ),
    "VIMCO signal's sign": Mutant(
        OBJECTIVES, "+ jnp.sum(signal * draws", "- jnp.sum(signal * draws", "test_objectives.py"
    ),
    "VIMCO without the model's part": Mutant(
        OBJECTIVES, "surrogate = log_mean_exp(log_w) +", "surrogate = log_mean_exp(held) +",
        "test_objectives.py",
    ),
    "Rényi order's sign": Mutant(
        OBJECTIVES, "log_w = 1 - options.alpha", "log_w = 1 + options.alpha", "test_objectives.py"
    ),
    "free bits the wrong way": Mutant(
        OBJECTIVES, "jnp.maximum(mean_rate, options.free_nats)",
        "jnp.minimum(mean_rate, options.free_nats)", "test_objectives.py",
    ),
    "total correlation's sign": Mutant(
        OBJECTIVES, "total_correlation = log_q - log_q_each",
        "total_correlation = log_q_each - log_q", "test_objectives.py",
    ),
    "minibatch weights without N": Mutant(
        OBJECTIVES, "jnp.log(draws.num_examples * jnp.sum(draws.weight))",
        "jnp.log(jnp.sum(draws.weight))", "test_objectives.py",
    ),
    "MMD with self-pairs": Mutant(
        OBJECTIVES, " * (1 - jnp.eye(len(a)))", "", "test_objectives.py"
    ),
    "MMD cross term once": Mutant(
        OBJECTIVES, "- 2 * between", "- between", "test_objectives.py"
    ),
    "relaxed draws that are not": Mutant(
        OBJECTIVES, "elbo(draws.at(draws.relaxed), options)", "elbo(draws.at(draws.z), options)",
        "models/test_discrete_vae.py",
    ),
    "straight through the wrong value": Mutant(
        OBJECTIVES, "_with_value(draws.z, draws.relaxed)", "_with_value(draws.relaxed, draws.z)",
        "models/test_discrete_vae.py",
    ),
    # Densities.
    "Bernoulli's sign": Mutant(
        DISTRIBUTIONS, "return x * logits - softplus", "return x * logits + softplus",
        "test_distributions.py",
    ),
    "log sigma's sign": Mutant(
        DISTRIBUTIONS, "math.log(2 * math.pi)) - log_sigma", "math.log(2 * math.pi)) + log_sigma",
        "test_distributions.py",
    ),
    "log-variance for log sigma": Mutant(
        DISTRIBUTIONS, "jnp.expm1(2 * log_sigma)", "jnp.expm1(log_sigma)", "test_distributions.py"
    ),
    "KL without its mean": Mutant(
        DISTRIBUTIONS, "(jnp.expm1(2 * log_sigma) + mu**2)", "(jnp.expm1(2 * log_sigma))",
        "test_distributions.py",
    ),
    "edge bins closed": Mutant(
        DISTRIBUTIONS, "jnp.where((x < 0.5) | (x > 254.5), edges, middle)", "middle",
        "test_distributions.py",
    ),
    "half a bin": Mutant(
        DISTRIBUTIONS, "width = 2 / 255 * inverse_scale", "width = 1 / 255 * inverse_scale",
        "test_distributions.py",
    ),
    # Priors and posteriors.
    "VampPrior without -log C": Mutant(
        PRIORS, "jnp.full(self.components, -math.log(self.components))",
        "jnp.zeros(self.components)", "nn/test_priors.py",
    ),
    "mixture weights not normalised": Mutant(
        PRIORS, "log_weights = nn.log_softmax(self.logits)", "log_weights = self.logits",
        "nn/test_priors.py",
    ),
    "IAF log-determinant's sign": Mutant(
        POSTERIORS, "return z, log_prob - log_det", "return z, log_prob + log_det",
        "nn/test_posteriors.py",
    ),
    "Cholesky without its determinant": Mutant(
        POSTERIORS, " - jnp.sum(log_diagonal, axis=-1)[None]", "", "nn/test_posteriors.py"
    ),
    "sigma that explodes": Mutant(
        POSTERIORS, "jnp.log(nn.softplus(raw) + _FLOOR)", "raw", "nn/test_posteriors.py"
    ),
    "masks that see themselves": Mutant(
        "nn/mlp.py", "before[:, None] < degrees[None]", "before[:, None] <= degrees[None]",
        "nn/test_mlp.py",
    ),
    "mean over pixels": Mutant(
        "likelihoods.py", "jnp.sum(bernoulli_log_prob(outputs[..., 0], x), axis=-1)",
        "jnp.mean(bernoulli_log_prob(outputs[..., 0], x), axis=-1)", "test_likelihoods.py",
    ),
    # Hierarchies, discrete latents, labels.
    "KL in the units of q": Mutant(
        DISTRIBUTIONS, "(mu_q - mu_p) * jnp.exp(-log_sigma_p)",
        "(mu_q - mu_p) * jnp.exp(-log_sigma_q)", "test_distributions.py",
    ),
    "layers' log-ratios reversed": Mutant(
        DRAWS, "jnp.mean(q - p, axis=0)", "jnp.mean(p - q, axis=0)",
        "models/test_two_level.py",
    ),
    "posterior blind to the upper level": Mutant(
        "models/two_level.py", "*known.infer_1(h, z[1])), axis=-1)",
        "*known.infer_1(h, 0 * z[1])), axis=-1)", "models/test_two_level.py",
    ),
    "top-down rate of the prior from the posterior": Mutant(
        "models/topdown.py", "gaussian_kl(*posterior, *p)", "gaussian_kl(*p, *posterior)",
        "models/test_topdown.py",
    ),
    "no entropy of the label": Mutant(
        "models/m2.py", "rate + log_q + math.log(num_classes)", "rate + math.log(num_classes)",
        "models/test_m2.py",
    ),
    "labelled examples by how often they come": Mutant(
        "models/m2.py", "weight_others = part / labelled.share,", "weight_others = 1.0,",
        "models/test_m2.py",
    ),
    "the rate of y not weighed": Mutant(
        "models/m2.py", "config.beta * rate_at_label", "rate_at_label", "models/test_m2.py",
    ),
    "label's density left out of the weight": Mutant(
        "models/m2.py", "- log_q_z[0] - log_q_y", "- log_q_z[0]", "models/test_m2.py",
    ),
    "layers' names reversed": Mutant(
        DRAWS, 'f"rate_{i + 1}": jnp', 'f"rate_{len(log_q) - i}": jnp', "models/test_hvae.py",
    ),
    "priors of the other layer": Mutant(
        HVAE, "[*inner, jnp.sum(standard_gaussian_log_prob(z[-1]), axis=-1)]",
        "[jnp.sum(standard_gaussian_log_prob(z[-1]), axis=-1), *inner]", "models/test_hvae.py",
    ),
    "priors of the other level": Mutant(
        "models/two_level.py", "return [lower, bound.log_prior_2(z[1])]",
        "return [bound.log_prior_2(z[1]), lower]", "models/test_two_level.py",
    ),
    "a layer's posterior that looks at itself": Mutant(
        HVAE, "(bound.pixels(x)[None], *z[:-1])",
        "(bound.pixels(x)[None], *jax.tree.map(jnp.zeros_like, z[:-1]))",
        "models/test_hierarchies.py",
    ),
    "a hierarchy that is not held": Mutant(
        HVAE, "held if detached else bound", "bound", "models/test_hierarchies.py",
    ),
    "free bits of all layers together": Mutant(
        "models/topdown.py", "rate=rate,  # of each", "rate=rate.sum(-1, keepdims=True),  #",
        "models/test_topdown.py",
    ),
    "a loss of one draw": Mutant(
        LATENT_VARIABLE, "draws = draw(params, batch, rng, num_samples)",
        "draws = draw(params, batch, rng, 1)", "models/test_hierarchies.py",
    ),
    "a loss of the usual numbers": Mutant(
        LATENT_VARIABLE, "OBJECTIVES[objective].cost(draws, options)",
        "OBJECTIVES[objective].cost(draws, Options())", "models/test_hierarchies.py",
    ),
    # The VAE.
    "the rate to N(0, I) whatever the prior": Mutant(
        VAE, 'config.posterior == "diagonal" and config.prior == "standard"',
        'config.posterior == "diagonal"', "models/test_vae.py",
    ),
    "pairs the wrong way round": Mutant(
        VAE, "gaussian_log_prob(z[:, None], mu[None], log_sigma[None])",
        "gaussian_log_prob(z[None], mu[:, None], log_sigma[:, None])", "models/test_vae.py",
    ),
    "a posterior that is not held": Mutant(
        VAE, "jax.lax.stop_gradient(context) if detached else context", "context",
        "models/test_hierarchies.py",
    ),
    "divergence from N(0, I) whatever the prior": Mutant(
        VAE, "lambda: vae.draw_prior(prior_rng, len(x))",
        "lambda: jax.random.normal(prior_rng, (len(x), config.latents))", "models/test_vae.py",
    ),
    "numbers in each other's place": Mutant(
        VAE, "alpha=self.alpha,\n            free_nats=self.free_nats",
        "alpha=self.free_nats,\n            free_nats=self.alpha", "models/test_vae.py",
    ),
    "encoded as the first class": Mutant(
        VAE, "context = vae.context(x, label)",
        "context = vae.context(x, None if label is None else 0 * label)", "models/test_vae.py",
    ),
    "decoded as the first class": Mutant(
        VAE, "vae.outputs(z, label, x), flat",
        "vae.outputs(z, None if label is None else 0 * label, x), flat", "models/test_vae.py",
    ),
    "samples of the first class": Mutant(
        VAE, "likelihoods.draw(likelihood, x_rng, vae.outputs(z, label), spec)",
        "likelihoods.draw(likelihood, x_rng, vae.outputs(z, None if label is None else 0 * label),"
        " spec)", "models/test_vae.py",
    ),
    # Discrete latents.
    "no gradient past the quantiser": Mutant(
        "nn/quantise.py", "(v - jax.lax.stop_gradient(v))  # the bracket is 0",
        "0 * jax.lax.stop_gradient(v)", "nn/test_quantise.py",
    ),
    "codebook without its own share": Mutant(
        "nn/quantise.py", "total - num[:, None] * codebook", "total - codebook",
        "nn/test_quantise.py",
    ),
    "padding in the codebook": Mutant(
        "nn/quantise.py", "member = weight[:, None, None] * ", "member = ", "nn/test_quantise.py"
    ),
    "one level too many": Mutant(
        "nn/quantise.py", "jnp.array(levels) - 1, range", "jnp.array(levels), range",
        "nn/test_quantise.py",
    ),
    "codebook that pulls the encoder": Mutant(
        "models/vqvae.py", "(hold(v) - z) ** 2", "(v - z) ** 2", "models/test_vqvae.py"
    ),
    "commitment that pulls the codebook": Mutant(
        "models/vqvae.py", "(v - hold(z)) ** 2", "(v - z) ** 2", "models/test_vqvae.py"
    ),
    "embeddings of the wrong position": Mutant(
        "nn/mlp.py", "np.repeat(degrees, self.inputs)", "np.tile(degrees, self.inputs)",
        "nn/test_autoregressive.py",
    ),
    "bands as short as their first column": Mutant(
        "nn/mlp.py", "np.count_nonzero(band[:, -1])", "np.count_nonzero(band[:, 0])",
        "nn/test_mlp.py",
    ),
    "uniform rate without log C": Mutant(
        "models/discrete_vae.py", "rate = math.log(config.classes) + jnp.sum", "rate = jnp.sum",
        "models/test_discrete_vae.py",
    ),
    # Evaluation.
    "importance-weighted bound without log K": Mutant(
        "evaluators/likelihood.py",
        "log_mean_exp(log_w[: repeats * k].reshape(repeats, k, -1), axis=1)",
        "jax.nn.logsumexp(log_w[: repeats * k].reshape(repeats, k, -1), axis=1)",
        "evaluators/test_likelihood.py",
    ),
    "annealing's sign": Mutant(
        "mcmc.py", "total += (beta - before)", "total -= (beta - before)",
        "test_mcmc.py",
    ),
    "annealing that forgets its direction": Mutant(
        "mcmc.py", "log_likelihood(moved if reverse else z)", "log_likelihood(moved)",
        "test_mcmc.py",
    ),
    "repeats not averaged in the error": Mutant(
        "evaluators/likelihood.py", "ddof=1) / repeats", "ddof=1)",
        "evaluators/test_likelihood.py",
    ),
    "a pixel that sees itself": Mutant(
        "nn/networks.py", "range(side * side // 2)", "range(side * side // 2 + 1)",
        "nn/test_networks.py",
    ),
    "aggregate posterior without log N": Mutant(
        "evaluators/aggregate.py", " - math.log(len(chosen))", "",
        "evaluators/test_aggregate.py",
    ),
    "marginal KL's sign": Mutant(
        "evaluators/aggregate.py", 'log_q - drawn["log_prior"]', 'drawn["log_prior"] - log_q',
        "evaluators/test_aggregate.py",
    ),
    "every proposal accepted": Mutant(
        "mcmc.py", "accepted = _accept(accept_rng, energy - proposed)",
        "accepted = energy < jnp.inf", "test_mcmc.py",
    ),
    "gap to the least informed code": Mutant(
        "evaluators/disentanglement.py", "[0.0, *information])[-2:]",
        "[0.0, *information])[[0, -1]]", "evaluators/test_disentanglement.py",
    ),
    "information not divided by entropy": Mutant(
        "evaluators/disentanglement.py",
        "(best - second) / mutual_information(factor, factor)", "best - second",
        "evaluators/test_disentanglement.py",
    ),
    "rows of importance not normalised": Mutant(
        "evaluators/disentanglement.py", "np.log(rows[there] / importance[there])",
        "np.log(1 / importance[there])", "evaluators/test_disentanglement.py",
    ),
    "vote for the liveliest code": Mutant(
        "evaluators/disentanglement.py", "np.argmin(chosen.var(axis=0))",
        "np.argmax(chosen.var(axis=0))", "evaluators/test_disentanglement.py",
    ),
    "collapsed codes vote": Mutant(
        "evaluators/disentanglement.py", "variance > _COLLAPSED * variance.max()",
        "variance > 0", "evaluators/test_disentanglement.py",
    ),
    # Flows.
    "scale left out of the log-determinant": Mutant(
        TRANSFORMS, "return x * jnp.exp(log_scale) + shift, log_scale",
        "return x * jnp.exp(log_scale) + shift, 0 * log_scale", "nn/test_priors.py",
    ),
    "inverse with the log-determinant of the map": Mutant(
        TRANSFORMS, "jnp.exp(-log_scale), -log_scale", "jnp.exp(-log_scale), log_scale",
        "nn/test_priors.py",
    ),
    "coupling inverted wrongly": Mutant(
        TRANSFORMS, "(x - shift) * jnp.exp(-log_scale)", "(x - shift) * jnp.exp(log_scale)",
        "nn/test_priors.py",
    ),
    "variables left at zero": Mutant(
        BIJECTIONS, "return y.at[..., j].set(found[..., j])", "return y",
        "nn/test_priors.py",
    ),
    "spline's slope with a first power": Mutant(
        TRANSFORMS, "/ divisor**2", "/ divisor", "nn/test_bijections.py"
    ),
    "one pixel's determinant for all": Mutant(
        BIJECTIONS, "jnp.sum(log_diagonal) * (len(flat) // len(x))", "jnp.sum(log_diagonal)",
        "nn/test_bijections.py",
    ),
    "scales that drop their log-determinant": Mutant(
        BIJECTIONS, "level(to_patches(x, 2), context)\n            total += log_det",
        "level(to_patches(x, 2), context)\n            total += 0 * log_det",
        "nn/test_bijections.py",
    ),
    "bins without their width": Mutant(
        FLOW, " - math.log(num_values) - log_low", " - log_low", "models/test_flow.py"
    ),
    "noise's density with the wrong sign": Mutant(
        FLOW, 'base_log_prob("logistic", epsilon) - log_det',
        'base_log_prob("logistic", epsilon) + log_det', "models/test_flow.py",
    ),
    "noise on the wrong scale": Mutant(
        FLOW, "return v, log_q - sum_event(_log_slope_of_sigmoid(v))", "return v, log_q",
        "models/test_flow.py",
    ),
    "margin's slope forgotten": Mutant(
        FLOW, "jnp.log(1 - 2 * margin) - math.log", "-math.log", "models/test_flow.py"
    ),
    # Energy-based.
    "Langevin noise of half the variance": Mutant(
        "mcmc.py", "jnp.sqrt(2 * step_size) * noise", "jnp.sqrt(step_size) * noise",
        "test_mcmc.py",
    ),
    "correction blind to the proposal's density": Mutant(
        "mcmc.py", "before - proposed[1] + log_q", "before - proposed[1]", "test_mcmc.py"
    ),
    "grid without its cell": Mutant(
        ENERGY, "fine = jax.nn.logsumexp(fine) + num_dims * ", "fine = jax.nn.logsumexp(fine) + ",
        "models/test_energy.py",
    ),
    "chains pushed up": Mutant(
        ENERGY, "masked_mean(of_data, batch) - masked_mean(of_chains, rows)",
        "masked_mean(of_data, batch) + masked_mean(of_chains, rows)", "models/test_energy.py",
    ),
    "noise not divided by its level": Mutant(
        ENERGY, "(beside(sigma, x) * slope(params, x, sigma) - noise)",
        "(slope(params, x, sigma) - noise)", "models/test_energy.py",
    ),
    "noise added twice": Mutant(
        ENERGY, "x - config.sigma_min**2 * slope", "x + config.sigma_min**2 * slope",
        "models/test_energy.py",
    ),
    # Adversarial.
    "pair the wrong way round": Mutant(
        GAN, "Costs(nn.softplus(fake - real), nn.softplus(real - fake))",
        "Costs(nn.softplus(real - fake), nn.softplus(fake - real))", "models/test_gan.py",
    ),
    "hinge without its margin": Mutant(
        GAN, "nn.relu(1 - real)", "nn.relu(-real)", "models/test_gan.py"
    ),
    "R1 without its half": Mutant(
        GAN, "return squared_slope(critic, real) / 2", "return squared_slope(critic, real)",
        "models/test_gan.py",
    ),
    "R2 at the data": Mutant(
        GAN, "squared_slope(critic, fake)) / 2", "squared_slope(critic, real)) / 2",
        "models/test_gan.py",
    ),
    "slopes pulled to zero": Mutant(
        GAN, "(jnp.sqrt(squared + 1e-12) - 1) ** 2", "squared", "models/test_gan.py"
    ),
    "slopes beyond the data": Mutant(
        GAN, "(1 - weight) * fake", "(1 + weight) * fake", "models/test_gan.py"
    ),
    "a generator that teaches its judge": Mutant(
        GAN, "critic(jax.lax.stop_gradient(params), label)", "critic(params, label)",
        "models/test_gan.py",
    ),
    "a judge deaf to the label": Mutant(
        GAN, "(h) * label, axis=1)", "(h), axis=1)", "models/test_gan.py"
    ),
    "average without its warm-up": Mutant(
        "optim.py", "rate = jnp.maximum(1 - jnp.asarray(decay), 9 / (10 + step))",
        "rate = 1 - jnp.asarray(decay)",
        "test_optim.py",
    ),
    # Tokens.
    "queries not turned": Mutant(
        ATTENTION, "return rotate(query, angles), Cache", "return query, Cache",
        "nn/test_attention.py",
    ),
    "a step that sees no further back than itself": Mutant(
        ATTENTION, "seen = jnp.arange(cache.keys.shape[1])[None] <= index",
        "seen = jnp.arange(cache.keys.shape[1])[None] == index", "nn/test_attention.py",
    ),
    "one start for all labels": Mutant(
        "nn/autoregressive.py", "return self.start[label][:, None]",
        "return self.start[label * 0][:, None]", "nn/test_autoregressive.py",
    ),
    "cached tokens out of place": Mutant(
        "nn/autoregressive.py", "h = h + self.place[i][None, None]",
        "h = h + self.place[i - 1][None, None]", "nn/test_autoregressive.py",
    ),
    "bound without its weight": Mutant(
        MASKED, "levels.revealed / (levels.hidden * levels.prob)",
        "levels.revealed / (1 * levels.prob)", "models/test_masked_diffusion.py",
    ),
    "hidden tokens seen": Mutant(
        MASKED, "[values * visible, visible]", "[values, visible]",
        "models/test_masked_diffusion.py",
    ),
    "tokens that see themselves as zeros": Mutant(
        MASKED, "denoise(x, order < before)", "denoise(x, order < before - num)",
        "models/test_masked_diffusion.py",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_still_applies(name):
    mutant = MUTANTS[name]
    source = (REPO / "dgm_jax" / mutant.file).read_text()
    assert source.count(mutant.old) == 1, f"{mutant.old!r} is not once in {mutant.file}"


@pytest.mark.mutation
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name, tmp_path):
    mutant = MUTANTS[name]
    for folder in ("dgm_jax", "tests", "configs"):
        shutil.copytree(REPO / folder, tmp_path / folder)
    shutil.copy(REPO / "setup.cfg", tmp_path)
    target = tmp_path / "dgm_jax" / mutant.file
    target.write_text(target.read_text().replace(mutant.old, mutant.new))
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", f"tests/{mutant.tests}"],
        cwd=tmp_path,  # `python -m` looks here first: the copy is what is imported
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert tests.returncode == 1, f"survived {mutant.tests}:\n{tests.stdout[-2000:]}"
