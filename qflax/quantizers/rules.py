"""Which layer gets which quantizer: default specs and ordered rules on layer paths."""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from qflax.errors import UserError, closest, require
from qflax.quantizers.spec import ROLES, Spec, kind_of, spec_from_dict


@dataclasses.dataclass(frozen=True)
class Rule:
    """Overrides for the layers whose path matches a glob pattern.

    Attributes:
      layers: pattern on the path, `/` between module names; `*` also crosses `/`.
      overrides: role (one of `spec.ROLES`) -> None for float, or the spec's fields to change; with `kind`
        among them, a spec of its own.
    """

    layers: str
    overrides: Mapping[str, Mapping | None]

    def __hash__(self):
        return hash(self.layers)  # Mappings have none.

    def matches(self, path: str) -> bool:
        """Whether the rule is about the layer at `path`."""
        return fnmatch.fnmatchcase(path, self.layers)


@dataclasses.dataclass(frozen=True)
class Quantization:
    """A model's quantization policy. Later rules override earlier ones.

    Attributes:
      weights: default for the kernel of every convolution and dense layer; None is float.
      activations: default for the output of every activation function; None is float.
      outputs: default for the outputs of every convolution and dense layer, before norm and activation
        function; None is float.
      biases: default for their biases; None is float.
      rules: exceptions, in order. Places that are float by default (the input, the branches of a
        residual addition, ...) are quantized by a rule only.
      axis_name: mapped axis that shares a batch, for running averages.
      freeze_oscillating: whether weights of at most four bits freeze in training that oscillate between
        points of their grids more often than `set_oscillation_threshold` has said.
    """

    weights: Spec | None = None
    activations: Spec | None = None
    outputs: Spec | None = None
    biases: Spec | None = None
    rules: Sequence[Rule] = ()
    axis_name: str | None = None
    freeze_oscillating: bool = False

    def spec(self, role: str, path: str, *, by_default: bool = True) -> Spec | None:
        """The spec in force for `role` at the layer `path`.

        Args:
          role: one of `spec.ROLES`.
          path: the layer's path, `/` between module names.
          by_default: whether the layer takes the default spec without a rule.
        """
        default = getattr(self, role)
        spec = default if by_default else None
        for i, rule in enumerate(self.rules):
            if role in rule.overrides and rule.matches(path):
                base = spec or default
                spec = _override(base, rule.overrides[role], role, f"rules[{i}].{role}")
        return spec

    def check(self, sites: Iterable[tuple[str, str]]) -> None:
        """Raises `UserError` for a rule, or a role of one, that applies to none of the (role, path) sites."""
        sites = list(sites)
        paths = sorted({path for _, path in sites})
        for i, rule in enumerate(self.rules):
            matched = [(role, path) for role, path in sites if rule.matches(path)]
            if not matched:
                raise UserError(
                    f"rules[{i}]: no layer matches {rule.layers!r}{closest(rule.layers, paths)}; "
                    f"layers: {', '.join(paths)}"
                )
            for role in rule.overrides:
                if role not in {role for role, _ in matched}:
                    raise UserError(
                        f"rules[{i}]: {rule.layers!r} matches {matched[0][1]!r}, which has no {role}; "
                        f"it has {', '.join(sorted({role for role, _ in matched}))}"
                    )


FLOAT = Quantization()  # Quantizes nothing.


def quantization_from_config(config: Mapping, axis_name: str | None = None) -> Quantization:
    """Makes the policy from a config's fields `rules`, those named after the roles, and where there is one
    `oscillation_freezing`.

    A rule is a mapping such as `{"layers": "conv_init", "weights": {"bits": 8}, "activations": None}`.

    Raises:
      UserError: unknown fields or impossible values, naming the field.
    """
    parsed = []
    for i, fields in enumerate(config["rules"]):
        require(
            isinstance(fields, Mapping) and isinstance(fields.get("layers"), str),
            f"rules[{i}]={fields!r}: a rule is a mapping with 'layers' (a pattern) and overrides",
        )
        overrides = {name: value for name, value in fields.items() if name != "layers"}
        for name, value in overrides.items():
            if name not in ROLES:
                raise UserError(
                    f"rules[{i}].{name}: no such role{closest(name, ROLES)}; choices: {', '.join(ROLES)}"
                )
            require(
                value is None or isinstance(value, Mapping),
                f"rules[{i}].{name}={value!r}: must be None or a mapping of spec fields",
            )
        require(bool(overrides), f"rules[{i}]={fields!r}: changes nothing; add {' or '.join(ROLES)}")
        parsed.append(Rule(fields["layers"], overrides))
    defaults = {role: spec_from_dict(config[role], role, role) for role in ROLES}
    return Quantization(
        **defaults,
        rules=tuple(parsed),
        axis_name=axis_name,
        freeze_oscillating=any(config.get("oscillation_freezing", ())),
    )


def _override(base: Spec | None, fields: Mapping | None, role: str, where: str) -> Spec | None:
    if fields is None or base is None or "kind" in fields:
        return spec_from_dict(fields, role, where)
    return spec_from_dict({"kind": kind_of(base), **dataclasses.asdict(base), **fields}, role, where)
