"""What a trained network is made of: its layers' costs, its weights on their grids, its size as a file."""

import dataclasses
import pathlib
import tempfile

import jax

from qflax.deploy.exporting import export
from qflax.layers import LayerCost
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
    """

    step: int
    costs: tuple[LayerCost, ...]
    kernels: tuple[LayerKernel, ...]


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
    )


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
