"""The network and the training of the contenders in PyTorch."""

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers.problem import Problem

Layer = Callable[..., nn.Module]


def _value(x) -> torch.Tensor:
    """The tensor in what a layer returns, which with Brevitas may know its scale and width, too."""
    return x if isinstance(x, torch.Tensor) else x.value


def _norm(problem: Problem, features: int) -> nn.Module:
    return nn.BatchNorm2d(features, problem.batch_norm_epsilon, 1 - problem.batch_norm_momentum)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut that subsamples and pads with zero channels."""

    def __init__(
        self, problem: Problem, inputs: int, features: int, stride: int, conv: Layer, activation: Layer
    ):
        super().__init__()
        self.stride, missing = stride, features - inputs
        self.padding = (0, 0, 0, 0, missing // 2, missing - missing // 2)
        self.conv1 = conv(inputs, features, 3, stride=stride, padding=1, bias=False)
        self.norm1, self.act1 = _norm(problem, features), activation()
        self.conv2 = conv(features, features, 3, padding=1, bias=False)
        self.norm2, self.act2 = _norm(problem, features), activation()

    def forward(self, x):
        """[batch, inputs, height, width] to [batch, features, height / stride, width / stride]."""
        branch = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        shortcut = _value(x)
        if any(self.padding):
            shortcut = F.pad(shortcut[:, :, :: self.stride, :: self.stride], self.padding)
        return self.act2(branch + shortcut)


class ResNet(nn.Module):
    """The network of a problem, of layers that are called like those of `torch.nn`."""

    def __init__(
        self,
        problem: Problem,
        *,
        stem: Layer = nn.Conv2d,
        conv: Layer = nn.Conv2d,
        activation: Layer = nn.ReLU,
        linear: Layer = nn.Linear,
    ):
        super().__init__()
        inputs, blocks = problem.num_filters, []
        self.stem = stem(3, inputs, 3, padding=1, bias=False)
        self.norm, self.act = _norm(problem, inputs), activation()
        for features, stride in problem.blocks:
            blocks.append(Block(problem, inputs, features, stride, conv, activation))
            inputs = features
        self.blocks = nn.Sequential(*blocks)
        self.classifier = linear(inputs, problem.num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images [batch, 3, height, width] to logits [batch, num_classes]."""
        x = self.blocks(self.act(self.norm(self.stem(images))))
        return self.classifier(_value(x).mean((2, 3)))


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Training:
    """A network, its optimizer and its data; a call makes one step.

    Attributes:
      loss: of the last step that was waited for.
    """

    def __init__(
        self,
        problem: Problem,
        model: nn.Module,
        *,
        memory_format: torch.memory_format = torch.channels_last,
        penalty: Callable[[], torch.Tensor] | None = None,
    ):
        """Prepares everything; the first step is yet to be made.

        Args:
          problem: what is trained.
          model: its network, in training mode.
          memory_format: of images and kernels.
          penalty: added to the loss, called after the network.
        """
        torch.set_num_threads(problem.threads)
        self._problem, self._penalty, self._step, self.loss = problem, penalty, 0, float("nan")
        self._device, self._memory_format = device(), memory_format
        self._model = model.to(self._device, memory_format=memory_format)
        self._images = torch.from_numpy(problem.images).to(self._device)
        self._labels = torch.from_numpy(problem.labels).to(self._device, torch.int64)
        mean, std = (torch.tensor(x, device=self._device).view(3, 1, 1) for x in (problem.mean, problem.std))
        self._mean, self._std = 255 * mean, 255 * std
        self._optimizer = _optimizer(problem, self._model)

    def __call__(self) -> None:
        """Makes one step on the next batch; a GPU's is not waited for."""
        start = self._problem.start(self._step)
        batch = slice(start, start + self._problem.batch_size)
        images = self._augment(self._images[batch])
        self._optimizer.zero_grad(set_to_none=True)
        with self._precision():
            logits = self._model(images)
        loss = F.cross_entropy(logits.float(), self._labels[batch])
        if self._penalty is not None:
            loss = loss + self._penalty()
        loss.backward()
        self._optimizer.step()
        self._loss = loss.detach()
        self._step += 1

    def wait(self) -> None:
        """Waits for all steps."""
        self.loss = self._loss.item()
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def device_memory(self) -> int | None:
        """The most bytes that were in use on a GPU."""
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None

    def _precision(self) -> contextlib.AbstractContextManager:
        if self._problem.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, getattr(torch, self._problem.dtype))

    def _augment(self, images: torch.Tensor) -> torch.Tensor:
        """Crops, flips and normalises uint8 images [batch, height, width, 3] to [batch, 3, height, width]."""
        (batch, side, _, _), padding = images.shape, self._problem.crop_padding
        padded = F.pad(images, (0, 0, padding, padding, padding, padding))
        offsets = torch.randint(2 * padding + 1, (2, batch, 1), device=self._device)
        rows, columns = offsets + torch.arange(side, device=self._device)
        flipped = torch.rand(batch, 1, device=self._device) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
        index = torch.arange(batch, device=self._device)[:, None, None]
        cropped = padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return ((cropped.float() - self._mean) / self._std).contiguous(memory_format=self._memory_format)


def _optimizer(problem: Problem, model: nn.Module) -> torch.optim.Optimizer:
    """SGD in one pass over all parameters, which is also the fastest on a CPU."""
    kernels, others = [], []
    for name, parameter in model.named_parameters():
        is_kernel = name.endswith("weight") and parameter.ndim > 1
        (kernels if is_kernel else others).append(parameter)
    groups = [{"params": kernels, "weight_decay": problem.weight_decay}, {"params": others}]
    return torch.optim.SGD(groups, problem.learning_rate, problem.momentum, fused=True)
