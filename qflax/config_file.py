"""Configurations from Python files, with changes of single fields from a command line."""

import pathlib
import re
import runpy
import traceback
from collections.abc import Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from qflax.errors import Interrupted, UserError, require, shown
from qflax.files import make_importable

_USAGE = "use --config=FILE --workdir=DIR --config.FIELD=VALUE"
_SEE = "see configs/default.py and, for weights and activations, the specs in qflax/quantizers"


def read(file: str, changes: Sequence[str]) -> ml_collections.ConfigDict:
    """The configuration of a file, with some of its fields changed.

    Args:
      file: path of a Python file that defines `get_config`; `path:text` hands it the text.
      changes: `--config.FIELD=VALUE`, ...; later ones win.

    Raises:
      UserError: the file cannot be executed, there is no such field, or a value does not fit it.
    """
    config = _executed(file)
    for change in changes:
        # Options of absl's own would read other files, or leave out arguments without a word.
        known = re.match(r"--?(no)?config\.", change) or not re.match(r"-+[^\W\d]", change)
        require(known, f"{shown(change)}: not understood; {_USAGE}")
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=list(changes))
        rest = values(["", *changes])[1:]
    except Exception as error:  # Parsers of the types raise unrelated ones.
        named, reason = isinstance(error, AttributeError | KeyError), _reason(error)
        if field := re.search(r'field "(\w+)" is None', reason):
            reason = f"config.{field[1]} is None in {shown(file, plain=True)} and has no fields; take a file "
            reason += "that sets it, such as configs/resnet20_int4_cifar10.py"
        elif named:
            reason = f"the configuration has no such field: {reason}"
        raise UserError(f"{shown(' '.join(changes), plain=True)}: {reason}; {_SEE}") from None
    if rest:
        raise UserError(f"{shown(rest[0])}: not understood; {_USAGE}")
    return values.config


def _executed(file: str) -> ml_collections.ConfigDict:
    path, colon, text = file.partition(":")
    given = f"--config={shown(file, plain=True)}"
    try:
        require(pathlib.Path(path).is_file(), f"{given}: no such file; configurations are in configs")
        # Configurations build upon each other: `from configs import default`.
        make_importable(pathlib.Path(), _import_root(pathlib.Path(path)))
        module = runpy.run_path(path)
        require("get_config" in module, f"{given}: defines no get_config(); start from configs/default.py")
        config = module["get_config"](*([text] if colon else []))
        frozen = isinstance(config, ml_collections.FrozenConfigDict)
        require(
            isinstance(config, ml_collections.ConfigDict) and not frozen,
            f"{given}: get_config() returns {type(config).__name__}, not a ConfigDict; start from "
            "configs/default.py",
        )
        config.to_dict()  # Some references are followed only now.
    except (UserError, KeyboardInterrupt, Interrupted):
        raise
    except BaseException as error:  # A file may raise anything, and end the program too.
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        place = f"line {lines[-1]}: " if lines else ""
        raise UserError(f"{given}: {place}{type(error).__name__}: {_reason(error)}; {_SEE}") from None
    return config.lock()


def _import_root(file: pathlib.Path) -> pathlib.Path:
    """The folder that holds a file, or the outermost package that the file is in."""
    return next(folder for folder in file.absolute().parents if not (folder / "__init__.py").exists())


def _reason(error: BaseException) -> str:
    reason = error
    while isinstance(reason, BaseException) and reason.args and not isinstance(reason, OSError | SyntaxError):
        reason = reason.args[0]  # The text; str() of a KeyError would quote and escape it.
    return shown(re.sub(r'Other fields present: "{.*}"', "", str(reason), flags=re.DOTALL), plain=True)
