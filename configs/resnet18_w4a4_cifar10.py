"""ResNet-18 with 4-bit weights and activations on CIFAR-10, learned scales, 8-bit stem and classifier.

python train.py --config=configs/resnet18_w4a4_cifar10.py --config.init_from=runs/resnet18_float_cifar10

The float network is the teacher, too. Not measured yet.
"""

from configs import resnet18_float_cifar10, resnet20_w3a3_cifar10


def get_config():
    """Returns the configuration."""
    config = resnet20_w3a3_cifar10.get_config()
    network = resnet18_float_cifar10.get_config()
    for name in ("model", "shortcut", "residual", "weight_decay"):
        config[name] = network[name]
    config.weights.bits = 4
    config.activations.bits = 4
    config.num_epochs = 90.0
    return config
