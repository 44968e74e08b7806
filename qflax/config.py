"""Checks of a run's configuration, before anything else happens."""

import json
import math
import pathlib
from collections.abc import Callable, Mapping

import ml_collections

from qflax.data import DATASETS
from qflax.errors import UserError, choose, closest, require
from qflax.files import write_atomically
from qflax.quantizers import CALIBRATIONS

FILE = "config.json"

# Fields that change where and how fast a run goes, not what comes out, and what to do about bad steps, of
# which there were none that a run went on from; a resumed run may change them.
OPERATIONAL = (
    "data_dir",
    "num_workers",
    "num_devices",
    "steps_per_dispatch",
    "eval_batch_size",
    "log_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "skip_bad_steps",
)


def _number(low: float, high: float = math.inf, *, integer: bool = False) -> Callable:
    def check(field, value):
        kinds = int if integer else (int, float)
        bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        ok = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
        word = "a whole number" if integer else "a number"
        require(ok and low <= value <= high, f"{field}={value!r}: must be {word} {bounds}")

    return check


def _one_of(*choices: str) -> Callable:
    return lambda field, value: choose(field, value, choices)


def _of_type(kind: type, name: str) -> Callable:
    return lambda field, value: require(isinstance(value, kind), f"{field}={value!r}: must be {name}")


def _numbers(length: int | None, low: float) -> Callable:
    def check(field, value):
        ok = isinstance(value, tuple | list) and length in (None, len(value))
        ok = ok and all(isinstance(v, int | float) and math.isfinite(v) and v >= low for v in value)
        count = "a tuple of" if length is None else f"{length}"
        require(ok, f"{field}={value!r}: must be {count} numbers of at least {low:g}")

    return check


def _fractions(field, value):
    _numbers(2, 0)(field, value)
    require(value[0] <= value[1] <= 1, f"{field}={value!r}: must be two fractions, the first not the larger")


def _anything(field, value):
    del field, value  # Checked where it is parsed.


_COUNT = _number(1, integer=True)
_COUNT_OR_ZERO = _number(0, integer=True)
_POSITIVE = _number(1e-30)
_NOT_NEGATIVE = _number(0)
_FRACTION = _number(0, 1)
_BELOW_ONE = _number(0, 1 - 1e-9)
_TEXT = _of_type(str, "a string")
_FLAG = _of_type(bool, "True or False")

_SIZES = {name: _NOT_NEGATIVE for name in ("weight_kib", "activation_kib_sum", "activation_kib_max")}

# Field -> check. A mapping is a group of fields.
FIELDS = {
    "model": _TEXT,
    "stem": _TEXT,
    "shortcut": _TEXT,
    "residual": _TEXT,
    "norm": _TEXT,
    "batch_norm_momentum": _BELOW_ONE,
    "batch_norm_epsilon": _POSITIVE,
    "dtype": _one_of("float32", "bfloat16"),
    "weights": _anything,
    "activations": _anything,
    "outputs": _anything,
    "biases": _anything,
    "rules": _of_type((tuple, list), "a tuple of mappings"),
    "calibration_examples": _COUNT,
    "calibration_batch_size": _COUNT,
    "calibration": _one_of(*CALIBRATIONS),
    "ptq": {
        "recipe": _of_type((tuple, list), "a tuple of methods"),
        "iterations": _COUNT,
        "batch_size": _COUNT,
        "learning_rate": _POSITIVE,
        "range_learning_rate": _NOT_NEGATIVE,
        "strength": _NOT_NEGATIVE,
        "drop": _FRACTION,
        "damping": _NOT_NEGATIVE,
        "report_examples": _COUNT,
    },
    "init_from": _TEXT,
    "dataset": _one_of(*DATASETS),
    "data_dir": _TEXT,
    "validation_examples": _COUNT_OR_ZERO,
    "crop": {
        "image_size": _COUNT,
        "resize": _COUNT,
        "area": _numbers(2, 0),
        "ratio": _numbers(2, 0),
    },
    "num_workers": _number(-1, integer=True),
    "mean": _numbers(3, 0),
    "std": _numbers(3, 1e-6),
    "augmentation": {
        "crop_padding": _COUNT_OR_ZERO,
        "flip": _FLAG,
        "cutout": _COUNT_OR_ZERO,
        "mixup_alpha": _NOT_NEGATIVE,
        "cutmix_alpha": _NOT_NEGATIVE,
    },
    "batch_size": _COUNT,
    "num_epochs": _POSITIVE,
    "num_train_steps": _number(-1, integer=True),
    "optimizer": _one_of("sgd", "adam"),
    "momentum": _BELOW_ONE,
    "nesterov": _FLAG,
    "learning_rate": _NOT_NEGATIVE,
    "schedule": _one_of("cosine", "onecycle", "step", "constant"),
    "warmup_epochs": _NOT_NEGATIVE,
    "milestone_epochs": _numbers(None, 0),
    "milestone_factor": _FRACTION,
    "weight_decay": _NOT_NEGATIVE,
    "gradient_clip": _NOT_NEGATIVE,
    "skip_bad_steps": _number(0, 2**24, integer=True),
    "loss": _one_of("cross_entropy", "squared_hinge"),
    "label_smoothing": _BELOW_ONE,
    "distillation": {"teacher": _TEXT, "weight": _FRACTION, "temperature": _POSITIVE},
    "ema_decay": _BELOW_ONE,
    "quantizer_optimizer": _one_of("sgd", "adam"),
    "quantizer_learning_rate": _NOT_NEGATIVE,
    "size_targets": _SIZES,
    "size_strengths": _SIZES,
    "size_ramp": _fractions,
    "freeze_widths_after": _FRACTION,
    "accumulator_strength": _NOT_NEGATIVE,
    "seed": _number(0, 2**32 - 1, integer=True),
    "num_devices": _COUNT_OR_ZERO,
    "steps_per_dispatch": _COUNT_OR_ZERO,
    "eval_batch_size": _COUNT,
    "log_every_steps": _COUNT,
    "eval_every_epochs": _POSITIVE,
    "checkpoint_every_steps": _COUNT,
    "keep_checkpoints": _COUNT,
}


def validate(config: Mapping) -> None:
    """Checks every field's name, type and range.

    Raises:
      UserError: one line that names the field, its value, the choices and the remedy.
    """
    _validate_group(config, FIELDS, "config.")
    require(
        config["num_train_steps"] != 0,
        "config.num_train_steps=0: must be positive, or -1 to train for num_epochs",
    )


def _validate_group(config: Mapping, fields: Mapping, prefix: str) -> None:
    require(hasattr(config, "items"), f"{prefix[:-1]}={config!r}: must be a mapping of fields")
    for name in config:
        if name not in fields:
            raise UserError(
                f"{prefix}{name}: no such field{closest(name, fields)}; configs/default.py lists them all"
            )
    for name, check in fields.items():
        require(name in config, f"{prefix}{name}: missing; start from configs/default.py")
        if isinstance(check, Mapping):
            _validate_group(config[name], check, f"{prefix}{name}.")
        else:
            check(f"{prefix}{name}", config[name])


def save(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Writes the configuration into the workdir, for every later command."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / FILE, json.dumps(plain(config), indent=2) + "\n")


def load(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Reads the configuration of a workdir.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = workdir / FILE
    require(path.is_file(), f"{workdir}: not a workdir, it has no {FILE}; train.py makes one")
    try:
        fields = json.loads(path.read_text())
        require(isinstance(fields, dict), f"{path}: damaged (no mapping); restore it from another copy")
        config = ml_collections.ConfigDict(fields)
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); restore it from another copy") from None
    try:
        validate(config)
    except UserError as error:
        raise UserError(f"{path}: {error} (written by another version of qflax?)") from None
    return config


def check_unchanged(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Raises `UserError` with the differing fields if the workdir holds a run of another configuration."""
    if not (workdir / FILE).exists():
        return
    new, old = (_flat(plain(c)) for c in (config, load(workdir)))
    missing = object()
    differing = [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if name not in OPERATIONAL and old.get(name, missing) != new.get(name, missing)
    ]
    require(
        not differing,
        f"{workdir}: holds a run of another configuration ({'; '.join(differing)}); "
        "choose another --workdir, or the same configuration to resume it",
    )


def plain(value):
    """The value in the types of JSON, as it comes back from a file."""
    if isinstance(value, Mapping | ml_collections.ConfigDict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def _flat(fields: Mapping, prefix: str = "") -> dict:
    flat = {}
    for name, value in fields.items():
        flat.update(
            _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
        )
    return flat
