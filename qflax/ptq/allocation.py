"""Bits per layer under a size budget: the post-training counterpart of learned widths."""

import glob
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qflax.errors import require
from qflax.ptq.sensitivity import Sensitivity


class _Option(NamedTuple):
    """A layer's width, the bits that its elements then take, and the divergence."""

    bits: int
    size: int
    cost: float


def allocate(
    rows: Sequence[Sensitivity], budget_bits: float, *, fixed_bits: float = 0.0, role: str = "weights"
) -> dict[str, int]:
    """Chooses one of the measured widths for each layer, so that the sum of divergences is the least.

    The sum stands for the divergence of all together, as if layers erred independently. A width beyond which
    nothing improves is not exceeded.

    Args:
      rows: as measured by `sensitivity.sensitivities`.
      budget_bits: for the elements of all layers, and what is fixed.
      fixed_bits: that there are in any case, such as those of biases.
      role: whose widths: `weights` or `activations`.

    Returns:
      Path of the layer -> bits, in the order of the rows.

    Raises:
      UserError: even the narrowest widths are beyond the budget; no row has the role, or one no finite
        divergence.
    """
    layers = _options(rows, role)
    smallest = fixed_bits + sum(options[0].size for options in layers.values())
    require(
        smallest <= budget_bits,
        f"budget_bits={budget_bits:g}: the narrowest measured widths of {role} take {smallest:g} bits "
        f"({fixed_bits:g} of them fixed); allow at least that, or measure narrower widths",
    )
    chosen = _solve(list(layers.values()), math.floor(budget_bits - fixed_bits))
    return {path: option.bits for path, option in zip(layers, chosen, strict=True)}


def rules_of(allocation: Mapping[str, int], *, role: str = "weights") -> tuple[dict, ...]:
    """Rules of a configuration that set the widths; they go behind those that there are.

    For specs that have `bits`: what a minifloat's rule would say, no width does.
    """
    return tuple({"layers": glob.escape(path), role: {"bits": bits}} for path, bits in allocation.items())


def _options(rows: Sequence[Sensitivity], role: str) -> dict[str, list[_Option]]:
    """Path of the layer -> its options, narrow ones first, each better than those before."""
    layers = {}
    for row in rows:
        if row.role == role:
            require(
                math.isfinite(row.divergence),
                f"{row.path}: the divergence of {role} at {row.bits} bits is {row.divergence}; measure again "
                "with calibration that fits, or leave that width out",
            )
            layers.setdefault(row.path, []).append(_Option(row.bits, row.elements * row.bits, row.divergence))
    require(bool(layers), f"role={role!r}: no row has it; measure with roles=({role!r},)")
    return {path: _improving(sorted(options)) for path, options in layers.items()}


def _improving(options: Sequence[_Option]) -> list[_Option]:
    """Those that cost less than all narrower ones: a wider grid only seems to be worse."""
    kept = [options[0]]
    for option in options[1:]:
        if option.cost < kept[-1].cost:
            kept.append(option)
    return kept


def _solve(layers: Sequence[Sequence[_Option]], budget: int) -> list[_Option]:
    """One option per layer, of the least sum of costs with a sum of sizes of at most `budget`."""
    # Takes long to import, and few programs get here.
    from scipy.optimize import Bounds, LinearConstraint, milp

    options = [option for layer in layers for option in layer]
    member = np.repeat(np.eye(len(layers)), [len(layer) for layer in layers], axis=1)
    unit = math.gcd(*(option.size for option in options))
    sizes = np.array([option.size // unit for option in options])
    costs = np.array([option.cost for option in options])
    # The solver takes for whole what is off by 1e-6, which of a large size is more than one. So sizes are
    # added up in two digits, and the last variable is what is carried from the low to the high ones.
    base = math.isqrt(int(sizes.max())) + 1
    (high, low), (most_high, most_low) = np.divmod(sizes, base), divmod(budget // unit, base)
    constraints = [
        LinearConstraint(np.c_[member, np.zeros(len(layers))], 1, 1),
        LinearConstraint([*low, -base], ub=most_low + 0.5),
        LinearConstraint([*high, 1], ub=most_high + 0.5),
    ]
    # It takes for equal what differs by 1e-6.
    costs = costs / (costs.max() or 1.0) * 1e6
    solution = milp(
        [*costs, 0],
        integrality=np.ones(len(options) + 1),
        bounds=Bounds(0, [*np.ones(len(options)), len(layers)]),
        constraints=constraints,
        options={"mip_rel_gap": 0},
    )
    return [option for option, share in zip(options, solution.x[:-1], strict=True) if share > 0.5]
