"""ResNets built of injected layers, their weights from other frameworks, and networks of the user's own."""

from qflax.models.own import build_own_model, is_own
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
    "build_own_model",
    "from_torchvision",
    "is_own",
    "read_state_dict",
]
