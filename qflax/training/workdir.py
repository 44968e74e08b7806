"""Workdirs: what later commands, and runs that start from another, read of a run."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import ml_collections
import numpy as np
from clu import parameter_overview

from qflax import config as config_lib
from qflax.data import Dataset, load
from qflax.data.augment import normalize
from qflax.errors import UserError, require
from qflax.files import require_makeable, write_atomically
from qflax.layers import LayerCost
from qflax.models import STATE_DICTS, from_torchvision, read_state_dict
from qflax.quantizers import ROLES
from qflax.training import build
from qflax.training.checkpoints import (
    DAMAGED_FOLDER,
    FOLDER,
    Checkpoints,
    CheckpointWriter,
    open_checkpoints,
)
from qflax.training.distillation import Teacher
from qflax.training.evaluate import Evaluator
from qflax.training.lock import locked
from qflax.training.logs import METRICS_FILE, TENSORBOARD_FOLDER
from qflax.training.optimizers import WEIGHTS
from qflax.training.parallel import Devices
from qflax.training.processes import from_first, is_first
from qflax.training.provenance import provenance
from qflax.training.state import TrainState

if TYPE_CHECKING:
    from qflax.data.streamed import StreamedDataset

RESULT_FILE = "result.json"
ENVIRONMENT_FILE = "environment.json"
TABLE_FILE = "layers.txt"

# By every run; a configuration comes first, so that without one nothing else is a run's.
_WRITTEN = (
    *(config_lib.FILE, FOLDER, RESULT_FILE, ENVIRONMENT_FILE, TABLE_FILE),
    *(METRICS_FILE, TENSORBOARD_FOLDER, DAMAGED_FOLDER),
)


def load_workdir(
    workdir: pathlib.Path, which: str = "latest", field: str = ""
) -> tuple[ml_collections.ConfigDict, TrainState]:
    """Configuration and state of a run.

    Args:
      workdir: of the run.
      which: `latest` or `best` (by validation accuracy).
      field: of the configuration that names it, for the message.

    Raises:
      UserError: no workdir, no checkpoint, or a damaged one.
    """
    config = config_lib.load(workdir, field)
    checkpoints = open_checkpoints(workdir)
    step = checkpoints.steps[-1]
    if which == "best":
        step = checkpoints.best_step()
        require(
            step is not None,
            f"{workdir}: has no sound checkpoint with a validation accuracy (config.validation_examples); "
            "use the latest",
        )
    return config, checkpoints.restore(build.abstract_state(config), step).state


def load_result(workdir: pathlib.Path) -> dict[str, object]:
    """The result of a run that has ended.

    Raises:
      UserError: it is damaged.
    """
    remedy = "delete it; train.py makes it again, and qflax evaluate shows the accuracy of any workdir"
    result = _load_json(workdir / RESULT_FILE, remedy)
    require(
        isinstance(result, dict) and "test_accuracy" in result,
        f"{workdir / RESULT_FILE}: damaged (no result); {remedy}",
    )
    return result


def _load_json(path: pathlib.Path, remedy: str):
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); {remedy}") from None


def serving(
    workdir: pathlib.Path, which: str = "latest"
) -> tuple[Callable[[Mapping, jax.Array], jax.Array], Mapping, tuple[int, ...], dict]:
    """What a run serves.

    Args:
      workdir: of the run.
      which: `latest` or `best`.

    Returns:
      A function of (variables, images float32 [batch, height, width, channels] of 0 to 255) to logits; the
      variables; the shape of an image; what to tell of the run.
    """
    config, state = load_workdir(workdir, which)
    model, mean, std = build.model(config), tuple(config.mean), tuple(config.std)

    def serve(variables, images):
        return model.apply(variables, normalize(images, mean, std), train=False)

    accuracy = load_result(workdir)["test_accuracy"] if (workdir / RESULT_FILE).exists() else None
    about = {
        "dataset": config.dataset,
        "model": config.model,
        "step": int(state.step),
        "test_accuracy": accuracy,
    }
    return serve, jax.device_get(state.served), build.image_format(config).image_shape, about


def import_weights(file: pathlib.Path, config: ml_collections.ConfigDict, workdir: pathlib.Path) -> int:
    """Makes a workdir of torchvision's weights, as of a run at step 0.

    Args:
      file: the weights, see `models.read_state_dict`.
      config: of the float network that they belong to.
      workdir: folder to make.

    Returns:
      Number of parameters.

    Raises:
      UserError: the weights do not fit, the network is quantized, or the workdir is there already.
    """
    config_lib.validate(config)
    require_unused(workdir)
    require_makeable(workdir)
    quantized = [role for role in ROLES if config[role] is not None]
    require(
        not quantized and not config.rules,
        f"config.{(*quantized, 'rules')[0]}: imported weights are float; import them with a float "
        "configuration (configs/resnet18_fp32.py), and start from that workdir with config.init_from",
    )
    abstract = build.abstract_state(config)
    variables = from_torchvision(read_state_dict(file), abstract.variables, str(file))
    state, origin = build.state(config, variables), {"imported_from": str(file), **provenance(1)}
    with locked(workdir):
        save_start(config, workdir, state, origin)
    return count_parameters(variables)


def save_start(config: ml_collections.ConfigDict, workdir: pathlib.Path, state: TrainState, origin: Mapping):
    """Makes a workdir as of a run at step 0 of one that is `locked`.

    Raises:
      UserError: there is a run in it, or what one would replace.
    """
    require_unused(workdir)
    config_lib.save(config, workdir)
    record_start(workdir, 0, origin)
    checkpoints = CheckpointWriter(workdir)
    checkpoints.save(jax.device_get(state), 0)
    checkpoints.close()


def require_trained(workdir: pathlib.Path) -> None:
    """Raises `UserError` for what `save_start` has made: training saves nothing before its first step."""
    require(
        0 not in Checkpoints(workdir).steps,
        f"{workdir}: was made without training (qflax import or calibrate); to train on from it, choose "
        f"another --workdir and --config.init_from={workdir}",
    )


def require_unused(workdir: pathlib.Path, others: Sequence[str] = ()) -> None:
    """Raises `UserError` if there is a run in the workdir, or what one would replace, or `others`."""
    made = [name for name in (*_WRITTEN, *others) if (workdir / name).exists()]
    require(not made, f"{workdir}: there is a {made[0]} already; choose another --workdir" if made else "")


def trained_on_held_out(config: ml_collections.ConfigDict) -> list[str]:
    """Workdirs that a run learns from, directly or not, and that were trained on images that it holds out."""
    found, left = {}, [config.init_from, config.distillation.teacher]
    while left:
        name = left.pop()
        if name in found or not (pathlib.Path(name) / config_lib.FILE).is_file():
            continue
        its = config_lib.load(pathlib.Path(name))
        left += [its.init_from, its.distillation.teacher]
        found[name] = its.dataset == config.dataset and its.validation_examples < config.validation_examples
    return sorted(name for name, seen in found.items() if seen)


def load_teacher(config: ml_collections.ConfigDict) -> Teacher | None:
    """The network that `config.distillation` names, with the last checkpoint's variables.

    Raises:
      UserError: it is no workdir, or its network reads other images or tells other classes.
    """
    fields = config.distillation
    if not fields.teacher:
        return None
    teacher = pathlib.Path(fields.teacher)
    require(
        teacher.suffix not in STATE_DICTS,
        f"config.distillation.teacher={fields.teacher!r}: weights without a configuration; make a workdir of "
        "them (qflax import FILE --config=... --workdir=DIR) and name that, or set it to '' for no teacher",
    )
    its = config_lib.load(teacher, "config.distillation.teacher")
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), build.abstract_state(its))
    state = from_first(load_workdir(teacher)[1] if is_first() else state)
    own_format, its_format = build.image_format(config), build.image_format(its)
    require(
        (config.dataset, own_format) == (its.dataset, its_format),
        f"config.distillation.teacher={fields.teacher!r}: trained on {its.dataset} ({its_format}), not on "
        f"{config.dataset} ({own_format}); name a run on {config.dataset}",
    )
    return Teacher(
        model=build.model(its, dtype=config.dtype),
        mean=tuple(its.mean),
        std=tuple(its.std),
        variables=state.served,
        weight=np.float32(fields.weight),
        temperature=np.float32(fields.temperature),
    )


def record_start(workdir: pathlib.Path, step: int, origin: Mapping) -> None:
    """Appends versions, commit, hardware and command of a start at `step` to the workdir's list of them."""
    starts = [*load_starts(workdir), {"from_step": step, **origin}]
    write_atomically(workdir / ENVIRONMENT_FILE, json.dumps(starts, indent=2) + "\n")


def load_starts(workdir: pathlib.Path) -> list[dict]:
    """What `record_start` has recorded; nothing before the first start.

    Raises:
      UserError: it is damaged.
    """
    path, remedy = workdir / ENVIRONMENT_FILE, "delete it, or put it back from a copy"
    starts = _load_json(path, remedy) if path.exists() else []
    sound = isinstance(starts, list) and all(isinstance(start, dict) for start in starts)
    require(sound, f"{path}: damaged (no list of starts); {remedy}")
    return starts


def count_parameters(variables: Mapping) -> int:
    """Number of weights, biases and norm parameters."""
    return int(parameter_overview.count_parameters(variables[WEIGHTS]))


def evaluator(
    config: ml_collections.ConfigDict, dataset: "Dataset | StreamedDataset", devices: Devices
) -> Evaluator:
    """Evaluator of the configuration's network on a data set."""
    return Evaluator(
        build.model(config),
        dataset,
        devices,
        batch_size=config.eval_batch_size,
        mean=tuple(config.mean),
        std=tuple(config.std),
        num_workers=build.workers(config),
    )


def load_evaluator(config: ml_collections.ConfigDict, split: str, devices: Devices) -> Evaluator:
    """The same on a split of the configuration's data set."""
    dataset = load(
        config.dataset,
        split,
        data_dir=config.data_dir or None,
        validation_examples=config.validation_examples,
        crop=build.crop(config),
    )
    return evaluator(config, dataset, devices)


def evaluate_workdir(
    workdir: pathlib.Path, *, split: str = "test", which: str = "latest", data_dir: str = ""
) -> tuple[dict[str, float], tuple[LayerCost, ...]]:
    """Evaluates a run's checkpoint.

    Args:
      workdir: of the run.
      split: `test`, `validation` or `train`.
      which: `latest` or `best`.
      data_dir: instead of the one in the run's configuration.

    Returns:
      Metrics and the layers' costs.
    """
    config, state = load_workdir(workdir, which)
    if data_dir:
        config.data_dir = data_dir
    devices = Devices()
    variables = devices.replicate(state.served)
    metrics = load_evaluator(config, split, devices)(variables)
    return metrics, build.measure_costs(config, state.served)
