"""The tables of results: what each row trains, and what was published for it."""

import dataclasses
import pathlib

from qflax.report.published import BREVITAS_A2Q, BREVITAS_MINIFLOAT, FLAX_RESNETS, published_accuracies

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table.

    Attributes:
      label: as readers see it.
      config: name of the configuration, without its folder and suffix.
      trained: whether it is trained; else it is quantized without training.
    """

    label: str
    config: str
    trained: bool = True

    @property
    def name(self) -> str:
        """In file names and on the command line."""
        return self.label.lower().replace(" ", "_").replace("+", "_plus").replace("=", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A network on a data set.

    Attributes:
      title: what it is.
      dataset: as configurations name it.
      source: whose figures stand beside ours, by the rows' labels.
      rows: the first one is the float network that all others start from.
    """

    title: str
    dataset: str
    source: str
    rows: tuple[Row, ...]

    @property
    def published(self) -> dict[str, float]:
        """Top-1 in percent that the source gives, by the row's label."""
        return published_accuracies(self.source, self.dataset)


def _a2q(variant: str) -> tuple[Row, ...]:
    name = variant.lower().replace("+", "_plus")
    return tuple(
        Row(label=f"{variant} P={bits}", config=f"resnet18_w4a4_{name}_{bits}b_cifar10")
        for bits in (16, 15, 14, 13, 12)
    )


TABLES = {
    "resnet20": Table(
        title="ResNet-20, CIFAR-10",
        dataset="cifar10",
        source=FLAX_RESNETS,
        rows=(
            Row(label="FP32", config="resnet20_fp32_cifar10"),
            Row(label="INT8 PTQ", config="resnet20_int8_cifar10", trained=False),
            Row(label="INT4 PTQ", config="resnet20_int4_cifar10", trained=False),
            Row(label="INT8 QAT", config="resnet20_int8_cifar10"),
            Row(label="INT4 QAT", config="resnet20_int4_cifar10"),
            Row(label="MIXED QAT", config="resnet20_mixed_cifar10"),
        ),
    ),
    "a2q": Table(
        title="ResNet-18, CIFAR-10, 4-bit weights and activations for accumulators of P bits (stem and "
        "classifier: 8-bit weights, any accumulator)",
        dataset="cifar10",
        source=BREVITAS_A2Q,
        rows=(
            Row(label="float", config="resnet18_float_cifar10"),
            *_a2q("A2Q"),
            *_a2q("A2Q+"),
        ),
    ),
    "minifloat": Table(
        title="ResNet-18, CIFAR-10, small floating point",
        dataset="cifar10",
        source=BREVITAS_MINIFLOAT,
        rows=(
            Row(label="FP32", config="resnet18_fp32_cifar10"),
            Row(label="w8a8 e4m3", config="resnet18_w8a8_e4m3_cifar10"),
            Row(label="w5a5 e3m1", config="resnet18_w5a5_e3m1_cifar10"),
        ),
    ),
    "imagenet": Table(
        title="ResNet-18, ImageNet",
        dataset="imagenet2012",
        source=FLAX_RESNETS,
        rows=(
            Row(label="FP32", config="resnet18_fp32"),
            Row(label="INT8 PTQ", config="resnet18_int8", trained=False),
            Row(label="INT4 PTQ", config="resnet18_int4", trained=False),
            Row(label="INT8 QAT", config="resnet18_int8"),
            Row(label="INT4 QAT", config="resnet18_int4"),
            Row(label="MIXED QAT", config="resnet18_mixed"),
        ),
    ),
}
