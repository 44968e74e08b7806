"""Figures that others have published, for marks beside our own."""

import dataclasses

FLAX_RESNETS = "a Flax repository of quantized ResNets (its 845652f)"
BREVITAS_A2Q = "Brevitas's accumulator-aware examples"
BREVITAS_MINIFLOAT = "an extension of Brevitas's QONNX examples"
_LINKS = {
    FLAX_RESNETS: {"learned widths": "https://arxiv.org/abs/1905.11452"},
    BREVITAS_A2Q: {"A2Q": "https://arxiv.org/abs/2308.13504", "A2Q+": "https://arxiv.org/abs/2401.10432"},
    BREVITAS_MINIFLOAT: {
        "code": "https://github.com/nghielme/brevitas/tree/float_quant_exp/src/brevitas_examples/bnn_pynq"
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A row of somebody's table.

    Attributes:
      source: whose.
      dataset, model: as configurations name them.
      label: of the row.
      accuracy: top-1 in percent, or None where none was given.
      kib: size of the weights in KiB of 1024 bytes, or None.
      accumulator_bits: that the weights were trained for, or None.
    """

    source: str
    dataset: str
    model: str
    label: str
    accuracy: float | None
    kib: float | None = None
    accumulator_bits: int | None = None


def _resnets(dataset: str, model: str, unit: float, rows: dict) -> tuple[Published, ...]:
    return tuple(
        Published(
            source=FLAX_RESNETS,
            dataset=dataset,
            model=model,
            label=label,
            accuracy=accuracy,
            kib=None if size is None else size * unit / 1024,
        )
        for label, (size, accuracy) in rows.items()
    )


def _resnet18(source: str, label: str, accuracy: float, accumulator_bits: int | None = None) -> Published:
    row = {"source": source, "label": label, "accuracy": accuracy, "accumulator_bits": accumulator_bits}
    return Published(dataset="cifar10", model="resnet18", **row)


def _a2q(variant: str, *accuracies: float) -> tuple[Published, ...]:
    return tuple(
        _resnet18(BREVITAS_A2Q, f"{variant} P={bits}", accuracy, bits)
        for bits, accuracy in zip((16, 15, 14, 13, 12), accuracies, strict=True)
    )


PUBLISHED = (
    *_resnets(
        "cifar10",
        "resnet20",
        1e3,
        {
            "FP32": (1072, 95.19),
            "INT8 PTQ": (268, 14.62),
            "INT4 PTQ": (134, 13.16),
            "INT8 QAT": (268, 93.83),
            "INT4 QAT": (134, 93.43),
            "MIXED QAT": (70, 93.51),
        },
    ),
    *_resnets(
        "imagenet2012",
        "resnet18",
        1e6,
        {
            "FP32": (None, 70.75),  # The 18.61 MB there are not of this network: float32 takes 46.7 MB.
            "INT8 PTQ": (11.68, 70.62),
            "INT4 PTQ": (5.84, 9.01),
            "INT8 QAT": (11.68, None),
            "INT4 QAT": (5.84, 69.94),
            "MIXED QAT": (5.40, None),
        },
    ),
    _resnet18(BREVITAS_A2Q, "float", 95.0),
    *_a2q("A2Q", 94.2, 94.2, 92.6, 89.8, 83.9),
    *_a2q("A2Q+", 94.2, 94.1, 94.1, 92.8, 90.6),
    _resnet18(BREVITAS_MINIFLOAT, "FP32", 92.82),
    _resnet18(BREVITAS_MINIFLOAT, "w8a8 e4m3", 93.09),
    _resnet18(BREVITAS_MINIFLOAT, "w5a5 e3m1", 90.69),
)


def linked(source: str) -> str:
    """The source in Markdown, with what it is based on."""
    return f"{source} ({', '.join(f'[{name}]({link})' for name, link in _LINKS[source].items())})"


def published_accuracies(source: str, dataset: str) -> dict[str, float]:
    """Top-1 in percent of each row of a source that gives it, by the row's label."""
    rows = (p for p in PUBLISHED if (p.source, p.dataset) == (source, dataset))
    return {p.label: p.accuracy for p in rows if p.accuracy is not None}
