"""Checks of a run's configuration, before anything else happens."""

import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping

import ml_collections

from qflax.data import DATASETS
from qflax.errors import UserError, choose, closest, require, shown
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


_MOST_INTEGER = 2**31 - 1  # Of int32.
_MOST_NUMBER = 1e9  # Beyond it nothing trains; float32 holds its square.
MOST_STEPS = 2**24  # float32, in which schedules count, tells steps apart up to here.
_MOST_EPOCHS = 1e6
_LONGEST_TEXT = 4096  # Of a path.
_MOST_PARTS = 10_000
_DEEPEST = 16
_LARGEST_FILE = 1 << 24  # Bytes of a config.json.


def _number(
    low: float, high: float = math.inf, *, integer: bool = False, most: float = _MOST_NUMBER
) -> Callable:
    most = high if high < math.inf else min(most, _MOST_INTEGER) if integer else most

    def check(field, value):
        kinds = int if integer else (int, float)
        bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        ok = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
        word = "a whole number" if integer else "a number"
        require(ok and low <= value <= high, f"{field}={shown(value)}: must be {word} {bounds}")
        require(value <= most, f"{field}={value!r}: must be {word} of at most {most:,.0f}")

    return check


def _one_of(*choices: str) -> Callable:
    return lambda field, value: choose(field, value, choices)


def _of_type(kind: type, name: str) -> Callable:
    return lambda field, value: require(isinstance(value, kind), f"{field}={shown(value)}: must be {name}")


def _numbers(length: int | None, low: float) -> Callable:
    def check(field, value):
        ok = isinstance(value, tuple | list) and length in (None, len(value))
        ok = ok and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
        ok = ok and all(low <= v <= _MOST_NUMBER for v in value)
        count = "a tuple of" if length is None else f"{length}"
        bounds = f"of at least {low:g}, at most {_MOST_NUMBER:g}"
        require(ok, f"{field}={shown(value)}: must be {count} numbers {bounds}")

    return check


def _fractions(field, value):
    _numbers(2, 0)(field, value)
    require(value[0] <= value[1] <= 1, f"{field}={value!r}: must be two fractions, the first not the larger")


def _frequencies(field, value):
    _numbers(2, 0)(field, value)
    ok = max(value) <= 1 and bool(value[0]) == bool(value[1])
    require(ok, f"{field}={value!r}: must be two frequencies in (0, 1], or (0.0, 0.0), which is off")


def _names(field, value):
    ok = isinstance(value, tuple | list) and all(isinstance(name, str) for name in value)
    require(ok, f"{field}={shown(value)}: must be a tuple of names")


def _anything(field, value):
    del field, value  # Checked where it is parsed.


_COUNT = _number(1, integer=True)
_COUNT_OR_ZERO = _number(0, integer=True)
_POSITIVE = _number(1e-30)
_EPOCHS_OR_ZERO = _number(0, most=_MOST_EPOCHS)
_EPOCHS = _number(1e-30, most=_MOST_EPOCHS)
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
        "recipe": _names,
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
        "image_size": _number(1, most=4096, integer=True),
        "resize": _number(1, most=8192, integer=True),
        "area": _numbers(2, 0),
        "ratio": _numbers(2, 0),
    },
    "num_workers": _number(-1, most=1024, integer=True),
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
    "num_epochs": _EPOCHS,
    "num_train_steps": _number(-1, most=MOST_STEPS, integer=True),
    "optimizer": _one_of("sgd", "adam"),
    "momentum": _BELOW_ONE,
    "nesterov": _FLAG,
    "learning_rate": _NOT_NEGATIVE,
    "schedule": _one_of("cosine", "onecycle", "step", "constant"),
    "warmup_epochs": _EPOCHS_OR_ZERO,
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
    "allocate_widths": _FLAG,
    "size_ramp": _fractions,
    "freeze_widths_after": _FRACTION,
    "accumulator_strength": _NOT_NEGATIVE,
    "oscillation_damping": _NOT_NEGATIVE,
    "oscillation_freezing": _frequencies,
    "seed": _number(0, 2**32 - 1, integer=True),
    "num_devices": _number(0, most=1024, integer=True),
    "steps_per_dispatch": _COUNT_OR_ZERO,
    "eval_batch_size": _COUNT,
    "log_every_steps": _COUNT,
    "eval_every_epochs": _EPOCHS,
    "checkpoint_every_steps": _COUNT,
    "keep_checkpoints": _COUNT,
}

# Fields that older workdirs lack -> what stood for them there.
_LATER = {"allocate_widths": False, "oscillation_damping": 0.0, "oscillation_freezing": (0.0, 0.0)}


def validate(config: Mapping) -> None:
    """Checks every field's name, type and range.

    Raises:
      UserError: one line that names the field, its value, the choices and the remedy.
    """
    for i, (field, value) in enumerate(_parts("config", config)):
        require(i < _MOST_PARTS, f"{field}: the configuration has more than {_MOST_PARTS} values; shorten it")
        _require_plain(field, value)
    _validate_group(config, FIELDS, "config.")
    require(
        config["num_train_steps"] != 0,
        "config.num_train_steps=0: must be positive, or -1 to train for num_epochs",
    )
    _check_together(config)


def _parts(field: str, value, depth: int = 0) -> Iterator[tuple[str, object]]:
    """Yields the name and value of a field, and of everything in it."""
    yield field, value
    require(depth < _DEEPEST, f"{field}: is nested deeper than {_DEEPEST} levels")
    if isinstance(value, Mapping | ml_collections.ConfigDict):
        for name in value:
            require(type(name) is str, f"{field}: has a field {shown(name)}, whose name is no string")
            yield from _parts(f"{field}.{name}", value[name], depth + 1)
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _parts(f"{field}[{i}]", item, depth + 1)


def _require_plain(field: str, value) -> None:
    """Raises `UserError` unless the value is one of JSON's, and of a size that fits in a file and a line."""
    kind = type(value)
    if kind is int:
        require(abs(value) < 2**63, f"{field}: has {value.bit_length()} bits; at most 63 are allowed")
    elif kind is str:
        require(
            len(value) <= _LONGEST_TEXT and "\0" not in value,
            f"{field}={shown(value)}: must be a text of at most {_LONGEST_TEXT} characters, none of them NUL",
        )
    elif not isinstance(value, Mapping | ml_collections.ConfigDict | tuple | list):
        require(
            value is None or kind in (bool, float),
            f"{field}: is a {kind.__module__}.{kind.__name__}; must be None, bool, int, float, str, a tuple "
            "or a mapping of Python's own (item() makes one of a NumPy number)",
        )


def _check_together(config: Mapping) -> None:
    """Checks of several fields that need to know nothing else."""
    require(
        not config["allocate_widths"] or any(config["size_targets"].values()),
        "config.allocate_widths=True: widths are allocated under a size target, and there is none; set one "
        "of config.size_targets, or this to False",
    )
    milestones = list(config["milestone_epochs"])
    if config["schedule"] == "step":
        require(
            milestones == sorted(milestones),
            f"config.milestone_epochs={tuple(milestones)}: must ascend",
        )
        require(
            config["num_train_steps"] > 0 or not milestones or milestones[-1] < config["num_epochs"],
            f"config.milestone_epochs={tuple(milestones)}: the last one lies behind the end of the run, "
            f"config.num_epochs={config['num_epochs']}; lower it, or train longer",
        )


def _validate_group(config: Mapping, fields: Mapping, prefix: str) -> None:
    require(hasattr(config, "items"), f"{prefix[:-1]}={shown(config)}: must be a mapping of fields")
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


def load(workdir: pathlib.Path, field: str = "") -> ml_collections.ConfigDict:
    """Reads the configuration of a workdir; `field` is the one that names it, for the message.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = workdir / FILE
    given = f"{field}={str(workdir)!r}" if field else str(workdir)
    require(path.is_file(), f"{given}: not a workdir, it has no {FILE}; train.py makes one")
    require(path.stat().st_size <= _LARGEST_FILE, f"{path}: damaged (large); restore it from another copy")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = shown(error, plain=True)
        raise UserError(f"{path}: damaged ({reason}); restore it from another copy") from None
    require(isinstance(fields, dict), f"{path}: damaged (no mapping); restore it from another copy")
    fields = {**_LATER, **fields}
    try:
        validate(fields)
    except UserError as error:
        raise UserError(f"{path}: {error} (written by another version of qflax?)") from None
    return ml_collections.ConfigDict(fields)


def check_unchanged(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Raises `UserError` with the differing fields if the workdir holds a run of another configuration."""
    if not (workdir / FILE).exists():
        return
    differing = differences(config, load(workdir))
    require(
        not differing,
        f"{workdir}: holds a run of another configuration ({'; '.join(differing)}); "
        "choose another --workdir, or the same configuration to resume it",
    )


def differences(new: Mapping, old: Mapping) -> list[str]:
    """Fields that make another run, as "NAME was OLD, is NEW", in the order of their names.

    `old` may be from an older version, which did not have all fields.
    """
    new, old, missing = flat(plain(new)), flat(plain({**_LATER, **old})), object()
    return [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if name not in OPERATIONAL and old.get(name, missing) != new.get(name, missing)
    ]


def plain(value):
    """The value in the types of JSON, as it comes back from a file."""
    if isinstance(value, Mapping | ml_collections.ConfigDict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def flat(fields: Mapping, prefix: str = "") -> dict:
    """All values, under names with a dot between those of groups and fields."""
    found = {}
    for name, value in fields.items():
        group = isinstance(value, Mapping | ml_collections.ConfigDict)
        found.update(flat(value, f"{prefix}{name}.") if group else {prefix + name: value})
    return found
