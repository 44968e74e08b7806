"""ResNet-18 with 4-bit weights and activations for 16-bit accumulators (A2Q), fine-tuned from the float one.

python train.py --config=configs/resnet18_w4a4_a2q_16b_cifar10.py \\
    --config.init_from=runs/resnet18_float_cifar10

Stem and classifier have 8-bit weights; the stem reads 8-bit images and its accumulator is not bounded. The
average pool keeps 8 bits, and the classifier's bias is an integer of 32 bits on its accumulator's grid. The
float network is the teacher, too. Measured so far, shortened: 48.26 % after 1 of 90 epochs, from a float
network at 50.95 %.
"""

from configs import default, resnet18_float_cifar10


def get_config():
    """Returns the configuration."""
    config = resnet18_float_cifar10.get_config()
    config.weights = default.accumulator_aware(bits=4, accumulator_bits=16, variant="a2q")
    config.activations = default.uniform(bits=4, scale="range")
    eight = dict(kind="uniform", bits=8, scale="statistic", granularity="per_channel")
    config.rules = (
        default.integer_input(),
        dict(layers="conv_init", weights=eight),
        dict(layers="pool/output", activations=dict(kind="truncation", bits=8)),
        dict(layers="classifier", weights=eight, biases=dict(bits=32)),
    )
    config.distillation.teacher = config.get_oneway_ref("init_from")
    config.num_epochs = 90.0
    config.learning_rate = 0.01
    config.quantizer_learning_rate = 0.01
    config.weight_decay = 1e-5
    return config
