"""ResNet-18 on ImageNet with 4-bit weights and activations in all layers: 5.84 MB.

python train.py --config=configs/resnet18_int4.py --config.init_from=runs/resnet18_fp32

init_from also takes torchvision's weights: resnet18-f37072fd.pth. Not measured on the full data set.
"""

from configs import default, resnet18_fp32


def get_config():
    """Returns the configuration."""
    config = resnet18_fp32.get_config()
    config.weights = default.uniform(bits=4, scale="lsq", granularity="per_channel", statistic="mse")
    config.activations = default.uniform(bits=4, scale="lsq", statistic="mse")
    config.rules = (default.integer_input(),)
    config.num_epochs = 50.0
    config.learning_rate = 0.004
    config.quantizer_learning_rate = 0.004
    return config
