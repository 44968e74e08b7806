"""ResNet-20 with 3-bit weights and activations, learned scales, 8-bit stem and classifier.

python train.py --config=configs/resnet20_w3a3_cifar10.py --config.init_from=runs/fp32

The float network is the teacher, too. Not measured yet.
"""

from configs import default, resnet20_int4_cifar10


def get_config():
    """Returns the configuration."""
    config = resnet20_int4_cifar10.get_config()
    config.weights.bits = 3
    config.activations.bits = 3
    eight = dict(bits=8)
    config.rules = (
        default.integer_input(),
        dict(layers="conv_init", weights=eight),
        dict(layers="pool/output", activations=eight),
        dict(layers="classifier", weights=eight),
    )
    config.distillation.teacher = config.get_oneway_ref("init_from")
    return config
