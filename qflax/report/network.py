"""What a trained network is made of: its layers' costs, its weights on their grids, its size as a file."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping

import jax
import numpy as np

from qflax.deploy.exporting import export
from qflax.layers import LayerCost
from qflax.quantizers import STATISTICS
from qflax.report.runs import Run
from qflax.training import build
from qflax.training.kernels import LayerKernel, layer_kernels
from qflax.training.workdir import load_workdir, serving


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """What a run serves.

    Attributes:
      step: of its checkpoint.
      costs: of the layers.
      kernels: of the layers whose kernels are quantized.
      allowed: path of a layer with accumulator-aware weights -> bits that its accumulator has.
    """

    step: int
    costs: tuple[LayerCost, ...]
    kernels: tuple[LayerKernel, ...]
    allowed: Mapping[str, int]

    @property
    def bounded_bits(self) -> int | None:
        """Accumulator bits that the layers with accumulator-aware weights need; None without any."""
        bounded = [cost for cost in self.costs if cost.path in self.allowed and cost.accumulation is not None]
        return max((cost.accumulation.exact_bits for cost in bounded), default=None)


def inspect(run: Run) -> Network:
    """The network of a run's last checkpoint.

    Raises:
      UserError: there is none, or a damaged one.
    """
    config, state = load_workdir(run.folder)
    served = jax.device_get(state.served)
    return Network(
        step=int(state.step),
        costs=build.measure_costs(config, served),
        kernels=layer_kernels(build.model(config), served, build.image_format(config).image_shape),
        allowed=_allowed(served),
    )


def _allowed(variables: Mapping) -> dict[str, int]:
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables.get(STATISTICS, {})):
        *layer, _, name = (str(key.key) for key in path)
        if name == "accumulator_bits":
            found["/".join(layer)] = int(np.max(leaf))
    return found


def file_bytes(run: Run) -> int:
    """Size of the packed file that a run's last checkpoint is exported to.

    Raises:
      UserError: it cannot be exported, or there is none.
    """
    function, variables, shape, about = serving(run.folder)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "network.packed"
        export(function, variables, shape, file, format="packed", metadata=about)
        return file.stat().st_size
