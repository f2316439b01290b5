"""Deep generative models in JAX: compiled end to end, tested against closed forms."""
