"""Flow matching: a velocity field that carries noise to data along nearly straight lines.

    x_t = (1 - t) x + t ε,  ε ~ N(0, I);   v(x_t, t) ≈ E[ε - x | x_t];   dx/dt = v

from noise at t = 1 to data at t = 0, as in diffusion. A flow has an exact density (Chen et al.
2018, "Neural ordinary differential equations", eq. 8):

    log p(x_0) = log N(x_1; 0, I) + ∫ div v(x_t, t) dt,  t from 0 to 1

Of bits and grey values it is that of x and uniform noise as wide as their steps, whose mean is a
bound on the probability of x (Theis et al. 2016).

References: Lipman et al. 2023, "Flow matching for generative modeling"; Liu et al. 2023, "Flow
straight and fast" (rectified flow); Tong et al. 2024, "Improving and generalizing flow-based
generative models with minibatch optimal transport"; Esser et al. 2024, "Scaling rectified flow
transformers" (logit-normal times); Grathwohl et al. 2019, "FFJORD" (Hutchinson's trace).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dgm_jax import checks, labels, likelihoods
from dgm_jax.core import Aux, Batch, DataSpec, Model, Params, Player, UserError, masked_mean
from dgm_jax.distributions import standard_gaussian_log_prob
from dgm_jax.nn import denoisers
from dgm_jax.nn.denoisers import Denoiser
from dgm_jax.nn.noise import precondition_straight
from dgm_jax.rows import beside

COUPLINGS = ("independent", "optimal_transport")
TIMES = ("uniform", "logit_normal")
SOLVERS = {"euler": "Euler", "midpoint": "Midpoint", "heun": "Heun", "dopri5": "Dopri5"}
DIVERGENCES = ("exact", "hutchinson", "none")
SAMPLING = ("guidance", "sample_steps", "solver")
MEASURING = ("divergence", "tolerance")


@dataclasses.dataclass(frozen=True)
class Config(denoisers.Config):
    """The model's fields; those of the network are in `nn.denoisers.Config`. Reals may be traced.

    Attributes:
      sigma_data: standard deviation of the data as the network sees it, images from -1 to 1 less
        their mean.
      coupling: which noise goes to which x: `independent`, or `optimal_transport`, in each batch
        that of the least squared distance in all, so that lines cross less.
      times: in training: `uniform` or `logit_normal`, most where noise and data are mixed.
      logit_mean: of log t / (1 - t) where these are normal; above 0 nearer to noise.
      logit_std: of the same: its standard deviation.
      solver: of the sampler, one of `SOLVERS`, with steps of equal length.
      sample_steps: of the sampler; each asks the network once, or twice (`midpoint`, `heun`), or
        six times (`dopri5`).
      divergence: of the likelihood: `exact`, for the price of D directions; `hutchinson`, an
        unbiased estimate from one direction; or `none`, which leaves the likelihood out.
      tolerance: of the likelihood, relative and absolute: its solver, `dopri5`, chooses its steps.
    """

    sigma_data: float = 0.5
    coupling: str = "independent"
    times: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    solver: str = "midpoint"
    sample_steps: int = 50
    divergence: str = "hutchinson"
    tolerance: float = 1e-4


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    denoisers.check(config, spec)
    checks.one_of(config, coupling=COUPLINGS, times=TIMES, solver=SOLVERS, divergence=DIVERGENCES)
    if config.coupling == "optimal_transport" and config.conditional:
        raise UserError(
            "model.coupling='optimal_transport' gives each class noise of its own, and samples "
            "start from any: with model.conditional=True set it to 'independent'"
        )
    checks.positive(config, "sigma_data", "logit_std", "tolerance")
    checks.finite(config, "logit_mean")
    checks.at_least(config, sample_steps=1)


# (x [B, *event], t []) -> dx/dt, like x
Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def solve(
    field: Callable[[jax.Array, Any], Any],
    start: Any,
    times: tuple[float, float],
    solver: str,
    steps: int = 0,
    tolerance: float | jax.Array = 0.0,
) -> Any:
    """The solution at the second of two times of dy/dt = field(t, y), from `start` at the first.

    Args:
      field: `(t [], y) -> like y`.
      start: a pytree of arrays.
      times: from and to.
      solver: one of `SOLVERS`.
      steps: how many, of equal length; 0 for as many as the tolerance needs.
      tolerance: relative and absolute.

    Returns:
      Like `start`; NaN where the tolerance needs more than 4,096 steps.
    """
    import diffrax  # takes longer to import than a step to compile

    first, last = times
    term = diffrax.ODETerm(lambda t, y, _: field(t, y))
    length = (last - first) / steps if steps else None
    control = diffrax.ConstantStepSize() if steps else diffrax.PIDController(tolerance, tolerance)
    adjoint = diffrax.ForwardMode()  # nothing is differentiated backwards
    found = diffrax.diffeqsolve(
        term,
        getattr(diffrax, SOLVERS[solver])(),
        first,
        last,
        length,
        start,
        stepsize_controller=control,
        adjoint=adjoint,
        max_steps=steps or 4096,
        throw=False,
    )
    solved = found.result == diffrax.RESULTS.successful
    return jax.tree.map(lambda y: jnp.where(solved, y[0], jnp.nan), found.ys)


def log_density(
    velocity: Velocity,
    x: jax.Array,
    directions: jax.Array | None,
    tolerance: float | jax.Array,
    steps: int = 0,
) -> jax.Array:
    """log p(x) `[B]` of the flow of a velocity field, nats.

    Args:
      velocity: v.
      x: at t = 0, `[B, *event]`.
      directions: of unit covariance, like `x`, for Hutchinson's estimate of the divergence; None
        for the exact one.
      tolerance: of the solver.
      steps: see `solve`.
    """
    axes = tuple(range(1, x.ndim))

    def field(t: jax.Array, y: tuple) -> tuple[jax.Array, jax.Array]:
        x, _ = y
        along = lambda e: jax.jvp(lambda x: velocity(x, t), (x,), (e,))  # noqa: E731
        if directions is not None:
            v, change = along(directions)
            return v, jnp.sum(change * directions, axis=axes)
        units = jnp.eye(x[0].size, dtype=x.dtype).reshape(-1, 1, *x.shape[1:])
        units = jnp.broadcast_to(units, (len(units), *x.shape))
        v, changes = jax.vmap(along, out_axes=(None, 0))(units)
        return v, jnp.sum(changes * units, axis=(0, *(i + 1 for i in axes)))

    start = (x, jnp.zeros(len(x), x.dtype))
    noise, change = solve(field, start, (0.0, 1.0), "dopri5", steps, tolerance)
    return jnp.sum(standard_gaussian_log_prob(noise), axis=axes) + change


def nearest_noise(x: jax.Array, noise: jax.Array, batch: Batch) -> jax.Array:
    """The same noise, put in the order of the least total squared distance to x (Tong et al. 2024).

    Args:
      x: `[B, *event]`.
      noise: as many.
      batch: for its mask; what is not real has no say.
    """
    # ‖x - ε‖² summed over pairs: only the product depends on who is whose.
    rows, columns = (a.reshape(len(a), -1) for a in (x, noise))
    cost = -(rows @ columns.T)
    if "mask" in batch:
        cost = jnp.where(batch["mask"][:, None], cost, 0.0)
    row, column = optax.assignment.hungarian_algorithm(cost)
    return noise[jnp.zeros_like(column).at[row].set(column)]


def dequantised(x: jax.Array, rng: jax.Array, spec: DataSpec) -> jax.Array:
    """What the flow is a density of: scaled x, of whole numbers with uniform noise of ± a half."""
    if spec.support != "real":
        x = x + jax.random.uniform(rng, x.shape, minval=-0.5, maxval=0.5)
    return denoisers.scaled(x, spec)


def build(config: Config, spec: DataSpec) -> Model:
    """Flow matching as pure functions; see `core.Model` for their contracts."""
    net, spec = Denoiser(config), denoisers.with_one_mean(spec)

    def answer(params: Params) -> denoisers.Answer:
        def velocity(x: jax.Array, time: jax.Array, label: jax.Array | None) -> jax.Array:
            along = beside(time, x)
            skip, out, scale = precondition_straight(along, config.sigma_data)
            return skip * x + out * net.apply({"params": params["field"]}, scale * x, time, label)

        return velocity

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        label = labels.one_hot(jnp.zeros(1, jnp.int32), config.conditional, spec)
        x = jnp.zeros((1, *spec.event_shape))
        return {"field": net.init(rng, x, jnp.zeros(1), label)["params"]}

    def times(rng: jax.Array, num: int) -> jax.Array:
        if config.times == "uniform":
            return denoisers.spread_times(rng, num)
        normal = denoisers.spread_normal(rng, num)
        return jax.nn.sigmoid(config.logit_mean + config.logit_std * normal)

    def cost(
        params: Params, batch: Batch, rng: jax.Array, coupling: str, label_dropout: float
    ) -> jax.Array:
        """‖v - (ε - x)‖² / 2 `[B]`: nats of a Gaussian of unit variance, to a constant."""
        time_rng, x_rng, noise_rng, label_rng = jax.random.split(rng, 4)
        x = dequantised(batch["x"], x_rng, spec)
        noise, t = jax.random.normal(noise_rng, x.shape), times(time_rng, len(x))
        if coupling == "optimal_transport":
            noise = nearest_noise(x, noise, batch)
        label = labels.one_hot(batch.get("label"), config.conditional, spec)
        label = denoisers.dropped(label, label_rng, label_dropout)
        along = beside(t, x)
        found = answer(params)((1 - along) * x + along * noise, t, label)
        return 0.5 * jnp.sum((found - (noise - x)) ** 2, axis=range(1, x.ndim))

    def loss_fn(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Mean squared error of the velocity.

        Lipman et al. 2023, eq. 9; Liu et al. 2023, eq. 1. With optimal transport its term is one of
        the batch, and has a name of its own.
        """
        found = cost(params, batch, rng, config.coupling, config.label_dropout)
        name = "velocity" if config.coupling == "independent" else "coupled_velocity"
        return 2 * masked_mean(found, batch) / spec.num_dims, Aux({name: found})

    def terms(params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """The cost of an example alone: with noise of its own, and the network told every label."""
        return {"velocity": cost(params, batch, rng, "independent", label_dropout=0.0)}

    def velocity(ask: Callable[[jax.Array, jax.Array], jax.Array]) -> Velocity:
        return lambda x, t: ask(x, jnp.full(len(x), t, x.dtype))

    def log_prob(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        x_rng, direction_rng = jax.random.split(rng)
        x = dequantised(batch["x"], x_rng, spec)
        label = labels.one_hot(batch.get("label"), config.conditional, spec)
        directions = None
        if config.divergence == "hutchinson":
            directions = jax.random.rademacher(direction_rng, x.shape, x.dtype)
        v = velocity(lambda x, time: answer(params)(x, time, label))
        found = log_density(v, x, directions, config.tolerance)
        return found - spec.num_dims * math.log(denoisers.unit(spec))

    def sample(
        params: Params, rng: jax.Array, num: int, label: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        told = labels.of_samples(num, label, config.conditional, spec)
        given = labels.one_hot(told.get("label"), config.conditional, spec)
        v = velocity(denoisers.guided(answer(params), given, config.guidance))
        noise = jax.random.normal(rng, (num, *spec.event_shape))
        field = lambda t, x: v(x, t)  # noqa: E731
        x = solve(field, noise, (1.0, 0.0), config.solver, config.sample_steps)
        return {"x": denoisers.whole(denoisers.unscaled(x, spec), spec)} | told

    density = "log_prob" if config.divergence == "exact" else "log_prob_hutchinson"
    name = density if spec.support == "real" else "elbo"
    return Model(
        init=init,
        players=(Player("field", loss_fn, terms),),
        log_likelihood_fns={} if config.divergence == "none" else {name: log_prob},
        sample=sample,
        samples_have_label=config.conditional,
    )
