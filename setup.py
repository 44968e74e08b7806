"""Packaging of qflax."""

import pathlib

from setuptools import find_packages, setup

EXTRAS = {
    "test": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.8"],
    "export": ["onnx>=1.16,<1.23", "qonnx>=1.0", "onnxruntime>=1.20", "tqdm"],
    "report": ["matplotlib>=3.8", "jinja2>=3.1", "tensorboard>=2.15"],
    # Versions that were tried; Brevitas 0.12 has no OCP formats.
    "benchmark": [
        "torch>=2.13",
        "torchao>=0.18",
        "brevitas>=0.13",
        "qwix>=0.1.8",
        "HGQ2>=0.2.0",
        "keras>=3.15",
    ],
}

setup(
    name="qflax",
    version="0.1.0",
    description="Training of quantized neural networks in JAX and Flax",
    long_description=pathlib.Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["qflax", "qflax.*"]),
    package_data={"qflax.report": ["page.html"]},
    # Lower bounds are the oldest versions that were tried, on Python 3.11. Before JAX 0.9.2 a strided index
    # was a gather, which no export has.
    install_requires=[
        "absl-py>=2.1",
        "clu>=0.0.12",
        "flax>=0.12",
        "grain>=0.2.15",
        "importlib_resources>=6.4",
        "jax>=0.9.2",
        "jaxlib>=0.9.2",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "opencv-python-headless>=4.11",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.25",
        "pillow>=10.4",
        "requests>=2.32",
        "safetensors>=0.4.5",
        "scikit-learn>=1.5",
        "scipy>=1.14",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.9",
        "tqdm>=4.66.5",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["qflax=qflax.__main__:run"]},
)
