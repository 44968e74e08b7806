"""Batch normalisation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype

from qflax.numerics import product, quotient


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm`, whose evaluation is one product and one sum per element.

    Variables, attributes and training are Flax's. With running averages the result is the same bits in every
    program and in every export: a factor and an offset per channel that are correctly rounded.
    """

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        """Normalises [..., channels]; arguments as of Flax's."""
        running = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        if not running or self.axis not in (-1, x.ndim - 1) or not self.has_variable("batch_stats", "mean"):
            return super().__call__(x, use_running_average, mask=mask)
        mean, variance = self.get_variable("batch_stats", "mean"), self.get_variable("batch_stats", "var")
        variance = variance + self.epsilon
        factor = quotient(jnp.sqrt(variance), variance)  # 1 / sqrt would become an approximate rsqrt.
        used = [x]
        if self.use_scale:
            used.append(self.get_variable("params", "scale"))
            factor = product(used[-1], factor)
        offset = -product(mean, factor)
        if self.use_bias:
            used.append(self.get_variable("params", "bias"))
            offset = offset + used[-1]
        y = product(x.astype(jnp.promote_types(x.dtype, jnp.float32)), factor) + offset
        return y.astype(canonicalize_dtype(*used, dtype=self.dtype))
