"""ResNet-20 for a 16-bit accumulator (A2Q+): 4-bit weights and activations, 8-bit stem and classifier.

python train.py --config=configs/resnet20_a2q_cifar10.py --config.init_from=runs/fp32

`--config.weights.accumulator_bits=12` is another accumulator, `--config.weights.variant=a2q` the first
version of the method. The accumulators of stem and classifier are as wide as their weights need.

Measured so far, shortened: 86.69 % for 12 bits after 3 epochs from a float network at 88.64 %, 82.08 % with
`a2q`; the commands are in docs/results.md.
"""

from configs import default


def get_config():
    """Returns the configuration."""
    config = default.get_config()
    config.weights = default.accumulator_aware(bits=4, accumulator_bits=16)
    config.activations = default.uniform(bits=4, scale="lsq", statistic="mse")
    eight = dict(kind="uniform", bits=8, granularity="per_channel", statistic="mse")
    config.rules = (
        default.integer_input(),
        dict(layers="conv_init", weights=eight),
        dict(layers="pool/output", activations=dict(bits=8)),
        dict(layers="classifier", weights=eight),
    )
    config.learning_rate = 0.01
    config.quantizer_learning_rate = 0.01
    return config
