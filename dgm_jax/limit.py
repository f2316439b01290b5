"""How fast the machine can do a step's matrix products alone: what speed is compared with."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

PRODUCTS = ("dot_general", "conv_general_dilated")

# A product as JAX wrote it (an equation of a jaxpr) and how often a call makes it.
Products = list[tuple[jex.JaxprEqn, int]]


def products_of(fn: Callable, *args: Any) -> Products:
    """The matrix products and convolutions of one call of `fn`, in their order.

    Those in a scan count once for each of its rounds, those in a `while` once. Of alternatives
    (`cond`) only the first is counted: where they differ by platform, that is the CPU's.

    Args:
      fn: any function JAX can trace.
      *args: its arguments, or their shapes.
    """
    return list(_walk(jax.make_jaxpr(fn)(*args).jaxpr, 1))


def _walk(jaxpr: jex.Jaxpr, times: int) -> Iterator[tuple[jex.JaxprEqn, int]]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in PRODUCTS:
            yield eqn, times
            continue
        inner = [_open(value) for value in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr)]
        inner = [jaxpr for jaxpr in inner if jaxpr is not None]
        if eqn.primitive.name == "cond":
            inner = inner[:1]
        rounds = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for each in inner:
            yield from _walk(each, times * rounds)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)


def _open(value: Any) -> jex.Jaxpr | None:
    if isinstance(value, jex.ClosedJaxpr):
        return value.jaxpr
    return value if isinstance(value, jex.Jaxpr) else None


def num_operations(products: Products) -> int:
    """Additions and multiplications of all products: 2 · M · N · K for each `[M, K] @ [K, N]`."""

    def of(eqn: jex.JaxprEqn) -> int:
        left, right = (var.aval.shape for var in eqn.invars)
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = math.prod(left[i] for i in contracted)
        else:  # the kernel's size for each of its outputs
            terms = math.prod(right) // right[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * terms * math.prod(eqn.outvars[0].aval.shape)

    return sum(times * of(eqn) for eqn, times in products)


def seconds_alone(products: Products, seconds: float = 1.0) -> float:
    """Seconds that the products take one after another with nothing between them.

    Each is made to wait for the one before, so that none is left out or made once for all calls.
    Factors of one shape share their memory, as weights and activations do in a step.

    Args:
      products: of one call, from `products_of`.
      seconds: how long to measure; compiling comes on top.
    """
    shapes = {_key(var) for eqn, _ in products for var in eqn.invars}
    arrays = {key: jnp.ones(key[0], key[1]) for key in shapes}

    def one(eqn: jex.JaxprEqn, carry: tuple) -> tuple:
        arrays, last = carry
        left, right = (_key(var) for var in eqn.invars)
        first = arrays[left].at[(0,) * len(left[0])].set(last.astype(left[1]))
        arrays = {**arrays, left: first}
        result = eqn.primitive.bind(arrays[left], arrays[right], **eqn.params)
        sign = jnp.sign(jax.lax.optimization_barrier(result).ravel()[0])
        return arrays, sign.astype(jnp.float32)

    def call(carry: tuple) -> tuple:
        for eqn, times in products:
            if times == 1:
                carry = one(eqn, carry)
            else:
                carry = jax.lax.fori_loop(0, times, lambda _, c, eqn=eqn: one(eqn, c), carry)
        return carry

    run = jax.jit(lambda carry, num: jax.lax.fori_loop(0, num, lambda _, c: call(c), carry))
    carry = jax.block_until_ready(run((arrays, jnp.float32(1)), 1))
    calls, num, began = 0, 1, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        carry = jax.block_until_ready(run(carry, num))
        calls, num = calls + num, min(2 * num, 100)
    return spent / calls


def _key(var: Any) -> tuple[tuple[int, ...], Any]:
    return var.aval.shape, var.aval.dtype
