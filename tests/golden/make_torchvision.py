"""Makes torchvision.npz and state_dict.pth here; needs torch and torchvision, which the tests do not."""

import pathlib

import numpy as np
import torch
import torchvision
from torchvision_weights import images, state_dict

FOLDER = pathlib.Path(__file__).parent
NAMES = ("resnet18", "resnet34", "resnet50")
IMAGE_SIZE = 64


def logits(name: str) -> dict[str, np.ndarray]:
    """Names and shapes of a network's state dict, and its logits."""
    model = torchvision.models.get_model(name).eval()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    weights = {key: torch.from_numpy(array) for key, array in state_dict(shapes).items()}
    model.load_state_dict(weights)
    with torch.no_grad():
        outputs = model(torch.from_numpy(images(IMAGE_SIZE)))
    return {
        f"{name}.names": np.array(list(shapes)),
        f"{name}.shapes": np.array([",".join(map(str, shape)) for shape in shapes.values()]),
        f"{name}.logits": outputs.numpy(),
    }


def small_state() -> dict[str, torch.Tensor]:
    """Tensors of several dtypes, of which three are views of one storage."""
    base = torch.arange(24, dtype=torch.float32) / 8
    return {
        "float32": base,
        "transposed": base.reshape(4, 6).t(),
        "slice": base[5:20:3],
        "expanded": torch.ones(1, 3).expand(2, 3),
        "parameter": torch.nn.Parameter(torch.tensor([-1.5, 2.5])),
        "float64": torch.tensor([0.1], dtype=torch.float64),
        "float16": torch.tensor([0.1, -65504], dtype=torch.float16),
        "bfloat16": torch.tensor([0.1, 3e38], dtype=torch.bfloat16),
        "int64": torch.tensor(2**40 + 1),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }


def main() -> None:
    """Writes both files."""
    state = small_state()
    torch.save({"model": state, "epoch": 3}, FOLDER / "state_dict.pth")
    arrays = {"images_size": np.array(IMAGE_SIZE)}
    for key, tensor in state.items():
        tensor = tensor.detach()
        # NumPy's files have no bfloat16, float32 holds its values.
        arrays[f"state_dict.{key}"] = (tensor.float() if key == "bfloat16" else tensor).numpy()
    for name in NAMES:
        arrays |= logits(name)
    np.savez_compressed(FOLDER / "torchvision.npz", **arrays)


if __name__ == "__main__":
    main()
