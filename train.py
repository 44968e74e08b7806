"""Trains a network: python train.py --config=configs/resnet20_int4_cifar10.py --workdir=runs/int4."""

import sys

from qflax import cpu
from qflax.cli import train_main

if __name__ == "__main__":
    cpu.use_huge_pages()
    sys.exit(train_main(sys.argv[1:]))
