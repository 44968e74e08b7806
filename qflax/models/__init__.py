"""ResNets built of injected layers."""

from qflax.models.registry import MODELS, build_model
from qflax.models.resnet_cifar import CifarResNet

__all__ = ["MODELS", "CifarResNet", "build_model"]
