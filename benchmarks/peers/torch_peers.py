"""PyTorch without quantization, and its own quantization-aware training (torchao's PT2E)."""

from benchmarks.peers.problem import Problem


def _float(problem: Problem):
    """cuDNN and oneDNN are at their best with channels last."""
    from benchmarks.peers.torch_resnet import ResNet, Training

    return Training(problem, ResNet(problem))


def _float_nchw(problem: Problem):
    """PyTorch's default memory format."""
    import torch

    from benchmarks.peers.torch_resnet import ResNet, Training

    return Training(problem, ResNet(problem), memory_format=torch.contiguous_format)


def _pt2e(problem: Problem):
    """Fake quantization of the exported network as the quantizer for x86 servers places it by default.

    Weights int8 per channel, activations uint8 per tensor with ranges of running averages, norms folded into
    the convolutions as in inference.
    """
    import torch
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    from benchmarks.peers.torch_resnet import ResNet, Training, device

    model = ResNet(problem).to(device(), memory_format=torch.channels_last)
    images = torch.zeros(problem.batch_size, 3, 32, 32, device=device())
    images = images.contiguous(memory_format=torch.channels_last)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    model = prepare_qat_pt2e(torch.export.export(model, (images,)).module(), quantizer)
    return Training(problem, move_exported_model_to_train(model))


CONTENDERS = {
    "PyTorch float": _float,
    "PyTorch float, NCHW": _float_nchw,
    "torch PT2E int8": _pt2e,
}
