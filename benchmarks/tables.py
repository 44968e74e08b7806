"""The tables of results: what each row trains, and what was published for it."""

import dataclasses
import pathlib

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table.

    Attributes:
      label: as readers see it.
      config: name of the configuration, without its folder and suffix.
      trained: whether it is trained; else it is quantized without training.
      published: top-1 in percent of the document that the table follows, or None where it has none.
    """

    label: str
    config: str
    trained: bool = True
    published: float | None = None

    @property
    def name(self) -> str:
        """In file names and on the command line."""
        return self.label.lower().replace(" ", "_").replace("+", "_plus").replace("=", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A network on a data set.

    Attributes:
      title: what it is.
      published: whose figures stand beside ours.
      rows: the first one is the float network that all others start from.
    """

    title: str
    published: str
    rows: tuple[Row, ...]


def _a2q(variant: str, accuracies: tuple[float, ...]) -> tuple[Row, ...]:
    name = variant.lower().replace("+", "_plus")
    return tuple(
        Row(label=f"{variant} P={bits}", config=f"resnet18_w4a4_{name}_{bits}b_cifar10", published=accuracy)
        for bits, accuracy in zip((16, 15, 14, 13, 12), accuracies, strict=True)
    )


TABLES = {
    "resnet20": Table(
        title="ResNet-20, CIFAR-10",
        published="a Flax repository of quantized ResNets (its 845652f)",
        rows=(
            Row(label="FP32", config="resnet20_fp32_cifar10", published=95.19),
            Row(label="INT8 PTQ", config="resnet20_int8_cifar10", trained=False, published=14.62),
            Row(label="INT4 PTQ", config="resnet20_int4_cifar10", trained=False, published=13.16),
            Row(label="INT8 QAT", config="resnet20_int8_cifar10", published=93.83),
            Row(label="INT4 QAT", config="resnet20_int4_cifar10", published=93.43),
            Row(label="MIXED QAT", config="resnet20_mixed_cifar10", published=93.51),
        ),
    ),
    "a2q": Table(
        title="ResNet-18, CIFAR-10, 4-bit weights and activations for accumulators of P bits",
        published="Brevitas's accumulator-aware examples",
        rows=(
            Row(label="float", config="resnet18_float_cifar10", published=95.0),
            *_a2q("A2Q", (94.2, 94.2, 92.6, 89.8, 83.9)),
            *_a2q("A2Q+", (94.2, 94.1, 94.1, 92.8, 90.6)),
        ),
    ),
    "minifloat": Table(
        title="ResNet-18, CIFAR-10, small floating point",
        published="an extension of Brevitas's QONNX examples",
        rows=(
            Row(label="FP32", config="resnet18_fp32_cifar10", published=92.82),
            Row(label="w8a8 e4m3", config="resnet18_w8a8_e4m3_cifar10", published=93.09),
            Row(label="w5a5 e3m1", config="resnet18_w5a5_e3m1_cifar10", published=90.69),
        ),
    ),
    "imagenet": Table(
        title="ResNet-18, ImageNet",
        published="the same repository as ResNet-20's",
        rows=(
            Row(label="FP32", config="resnet18_fp32", published=70.75),
            Row(label="INT8 PTQ", config="resnet18_int8", trained=False, published=70.62),
            Row(label="INT4 PTQ", config="resnet18_int4", trained=False, published=9.01),
            Row(label="INT8 QAT", config="resnet18_int8"),
            Row(label="INT4 QAT", config="resnet18_int4", published=69.94),
            Row(label="MIXED QAT", config="resnet18_mixed"),
        ),
    ),
}
