"""ResNet-18 in 8-bit floating point (e4m3): images, weights, outputs of convolutions, activations.

python train.py --config=configs/resnet18_w8a8_e4m3_cifar10.py --config.init_from=runs/resnet18_fp32_cifar10

Nothing is scaled. The classifier's bias and the logits are float. Measured so far, shortened: 53.06 % after 1
of 30 epochs, from a float network at 51.98 %.
"""

from configs import default, resnet18_fp32_cifar10


def get_config():
    """Returns the configuration."""
    config = resnet18_fp32_cifar10.get_config()
    config.weights = default.minifloat(exponent_bits=4, mantissa_bits=3, specials="nan")
    config.activations = config.weights.copy_and_resolve_references()
    config.outputs = config.weights.copy_and_resolve_references()
    config.rules = (
        dict(layers="input", activations={}),
        dict(layers="pool/output", activations={}),
        dict(layers="classifier", outputs=None),
    )
    config.distillation.teacher = config.get_oneway_ref("init_from")
    config.num_epochs = 30.0
    config.learning_rate = 0.01
    return config
