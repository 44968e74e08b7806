"""ResNet-18 on ImageNet with 4-bit weights and activations, learned scales, 8-bit stem and classifier.

python train.py --config=configs/resnet18_w4a4.py --config.init_from=runs/resnet18_fp32

The recipe of LSQ (Esser et al. 2020) with the float network as the teacher.
Not measured on the full data set.
"""

from configs import resnet18_int4, resnet20_w3a3_cifar10


def get_config():
    """Returns the configuration."""
    config = resnet18_int4.get_config()
    config.rules = resnet20_w3a3_cifar10.get_config().rules
    config.distillation.teacher = config.get_oneway_ref("init_from")
    config.batch_size = 256
    config.num_epochs = 90.0
    config.learning_rate = 0.01
    config.quantizer_learning_rate = 0.01
    return config
