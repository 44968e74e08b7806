"""ResNets built of injected layers."""

from qflax.models.registry import MODELS, build_model
from qflax.models.resnet import BasicBlock, Bottleneck, ResNet

__all__ = ["MODELS", "BasicBlock", "Bottleneck", "ResNet", "build_model"]
