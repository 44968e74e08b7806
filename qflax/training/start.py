"""The variables that a run starts from: random or another run's, calibrated for the quantizers."""

import pathlib
from collections.abc import Iterable, Mapping

import jax
import ml_collections
import numpy as np

from qflax import config as config_lib
from qflax.errors import require
from qflax.models import STATE_DICTS, from_torchvision, is_own, read_state_dict
from qflax.numerics import full_precision
from qflax.ptq import correct_biases, fold_norms, reestimate_norms, set_ranges
from qflax.quantizers import PARAMETERS, ROLES, STATISTICS, calibrate, frozen_share, widths_frozen
from qflax.training import build
from qflax.training.allocation import allocate_widths
from qflax.training.logs import Progress
from qflax.training.optimizers import WEIGHTS
from qflax.training.state import BATCH_STATS, initial_variables, weights_of
from qflax.training.workdir import RESULT_FILE, load_workdir

# With other ones, the same weights are another function.
_SAME_FUNCTION = ("dataset", "mean", "std", "model", "stem", "shortcut", "residual", "norm")
_QUANTIZATION = (*ROLES, "rules")


@full_precision()
def starting_variables(config: ml_collections.ConfigDict, batches: Iterable[jax.Array]) -> dict:
    """Variables of step 0.

    Another run's weights are projected onto what accumulators allow, where they are accumulator-aware
    (EP-init); activation ranges, norm statistics and biases are then set again, behind the projected weights.
    The ranges of a run with the very same quantizers are kept as they are. With `config.allocate_widths`
    learned widths start where the size targets hold.

    Args:
      config: of the run.
      batches: for calibration; passed over several times. `CalibrationBatches` where widths are allocated.

    Raises:
      UserError: `config.init_from` is no run of the same network.
    """
    network = build.model(config)
    variables = initial_variables(network, _image_shape(config), config.seed)
    over = {"over": config.calibration, "train": True}
    if not config.init_from:
        return calibrate(network, variables, batches, **over)
    original, kept = start_from(config, variables)
    if kept:
        return original
    if config.allocate_widths and any(config.size_targets.values()):
        weights = weights_of(original)
        Progress.say("measuring what each width does to each layer, to start where the size targets hold")
        allocated, _ = allocate_widths(config, weights, batches, learned_alone=True)
        # The very network but for what its learned widths start from.
        network = build.model(allocated)
        original = {**initial_variables(network, _image_shape(config), config.seed), **weights}
    variables, projected = set_ranges(network, original, batches, **over)
    if not projected:
        return variables
    variables = reestimate_norms(
        build.model(config, immediate=True),
        variables,
        build.float_model(config, immediate=True),
        original,
        batches,
    )
    reference = build.float_model(config)
    return correct_biases(network, variables, reference, original, batches, Progress.say)


def start_from(config: ml_collections.ConfigDict, variables: Mapping) -> tuple[dict, bool]:
    """Variables with the weights and norm statistics that `config.init_from` names.

    Args:
      config: of this run.
      variables: of this run, real or abstract.

    Returns:
      The variables, and whether the quantizers' are the other run's, too: where it has the same ones, and
      none that learns its width.

    Raises:
      UserError: another network, data set or normalisation; names and shapes differ.
    """
    source = pathlib.Path(config.init_from)
    if source.suffix in STATE_DICTS:
        return {**variables, **_imported(source, config, variables)}, False
    its, state = load_workdir(source, field="config.init_from")
    if not (source / RESULT_FILE).exists() and state.step > 0:
        Progress.say(f"{source}: has not ended; its checkpoint of step {state.step} is taken")
    folding = config.norm == "folded" and its.norm == "batch"
    _require_same_function(config, its, folding)
    served = _fold(its, state.served) if folding else state.served
    _require_same_shapes(config, variables, served)
    taken = [WEIGHTS, BATCH_STATS]
    own, theirs = config_lib.plain(config), config_lib.plain(its)
    same = all(own[name] == theirs[name] for name in _QUANTIZATION) and not folding
    same = same and widths_frozen(served[STATISTICS]) is None and bool(served[STATISTICS])
    # Records of oscillations only one of the two may have.
    same = same and (frozen_share(served[STATISTICS]) is None) == (not any(config.oscillation_freezing))
    if same:
        taken += [PARAMETERS, STATISTICS]
    return {**variables, **{name: served[name] for name in taken if name in served}}, same


def _imported(file: pathlib.Path, config: ml_collections.ConfigDict, variables: Mapping) -> dict:
    """Weights of a file of torchvision's."""
    where = f"config.init_from={str(file)!r}"
    if config.norm == "batch":
        return from_torchvision(read_state_dict(file), variables, where)
    normed = config.copy_and_resolve_references()
    normed.norm = "batch"
    abstract = build.abstract_state(normed).variables
    return _fold(normed, from_torchvision(read_state_dict(file), abstract, where))


def _fold(config: ml_collections.ConfigDict, variables: Mapping) -> dict:
    """Weights of the network without norms from those of one with them."""
    example = np.random.default_rng(0).normal(size=(1, *_image_shape(config))).astype(np.float32)
    weights = {name: variables.get(name, {}) for name in (WEIGHTS, BATCH_STATS)}
    return {**variables, BATCH_STATS: {}, **fold_norms(build.float_model(config), weights, example)}


def _image_shape(config: ml_collections.ConfigDict) -> tuple[int, ...]:
    return build.image_format(config).image_shape


def _require_same_function(config, its, folding: bool) -> None:
    own, theirs = config_lib.plain(config), config_lib.plain(its)
    names = [name for name in _SAME_FUNCTION if not (folding and name == "norm")]
    if config.norm == "batch" and not is_own(config.model):
        names.append("batch_norm_epsilon")
    differing = [
        f"{name} is {its[name]!r} there, {config[name]!r} here" for name in names if theirs[name] != own[name]
    ]
    require(
        not differing,
        f"config.init_from={config.init_from!r}: another network or other inputs "
        f"({'; '.join(differing[:3])}); start from a run of the same ones",
    )


def _require_same_shapes(config, variables: Mapping, served: Mapping) -> None:
    for collection in (WEIGHTS, BATCH_STATS):
        new, old = (_shapes(tree.get(collection, {})) for tree in (variables, served))
        wrong = [
            f"{name}: {old.get(name, 'missing')} there, {new.get(name, 'missing')} here"
            for name in sorted(new.keys() | old.keys())
            if new.get(name) != old.get(name)
        ]
        require(
            not wrong,
            f"config.init_from={config.init_from!r}: another network's {collection} ({'; '.join(wrong[:3])}"
            f"{'; ...' if len(wrong) > 3 else ''}); start from a run of the same model and data set",
        )


def _shapes(tree: Mapping) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
