"""ResNets built of injected layers, and their weights from other frameworks."""

from qflax.models.registry import MODELS, build_model
from qflax.models.resnet import BasicBlock, Bottleneck, ResNet
from qflax.models.state_dict import STATE_DICTS, read_state_dict
from qflax.models.torchvision import from_torchvision

__all__ = [
    "MODELS",
    "STATE_DICTS",
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "build_model",
    "from_torchvision",
    "read_state_dict",
]
