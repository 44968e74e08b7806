"""What quantizer parameters must satisfy after every update, whatever the gradients."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from qflax.errors import require
from qflax.quantizers.collections import CONSTRAINTS

LARGEST_LOG2 = 24.0
POSITIVE = (2.0**-LARGEST_LOG2, 2.0**LARGEST_LOG2)
ANY_LOG2 = (-LARGEST_LOG2, LARGEST_LOG2)
NEGATIVE = (-POSITIVE[1], 0.0)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Box:
    """Every parameter of a quantizer lies between its bounds.

    Attributes:
      bounds: (name, low, high) of each parameter.
    """

    bounds: tuple[tuple[str, float, float], ...]

    def project(self, parameters: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The nearest parameters that satisfy it; NaN stays NaN."""
        return {name: jnp.clip(parameters[name], low, high) for name, low, high in self.bounds}

    def limit_gradients(
        self, gradients: Mapping[str, jax.Array], parameters: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Gradients (reduced over all devices) as the optimizer should see them."""
        del parameters
        return dict(gradients)


def constrain(quantizer_params: Mapping, state: Mapping) -> dict:
    """Quantizer parameters, projected to where they must lie; call it after every update.

    Args:
      quantizer_params: the collection `PARAMETERS`.
      state: what a forward pass with `CONSTRAINTS` mutable returned.

    Raises:
      UserError: `CONSTRAINTS` was not mutable.
    """
    return _each(lambda constraint, own: constraint.project(own), state, quantizer_params)


def limit_gradients(gradients: Mapping, quantizer_params: Mapping, state: Mapping) -> dict:
    """Gradients of `quantizer_params` within the bounds that their quantizers set.

    Of learned widths: of a width within one bit, of a step and a range within one step (Uhlich et al. 2020).
    Call it after the gradients have been averaged over the devices, or the bound depends on their number.

    Raises:
      UserError: `CONSTRAINTS` was not mutable.
    """
    return _each(
        lambda constraint, own, parameters: constraint.limit_gradients(own, parameters),
        state,
        gradients,
        quantizer_params,
    )


def _each(function: Callable, state: Mapping, *trees: Mapping) -> dict:
    def walk(constraints, *trees):
        if "constraint" in constraints:
            return function(constraints["constraint"], *trees)
        unknown = sorted(trees[0].keys() - constraints.keys())
        require(
            not unknown,
            f"{', '.join(unknown[:3])}: no constraints in the state; apply the model with "
            f"mutable=[..., {CONSTRAINTS!r}]",
        )
        return {name: walk(constraints[name], *(tree[name] for tree in trees)) for name in trees[0]}

    return walk(state.get(CONSTRAINTS, {}), *trees)
