"""Brevitas's quantization-aware training, on PyTorch with channels last.

Weights per channel (e4m3: per tensor), activations per tensor; the stem's and the classifier's weights have
8 bits. Activation scales are learned, and initialised from the statistics of one step instead of Brevitas's
300, whose percentiles would be timed otherwise. Accumulator-aware rows follow Brevitas's own examples
(imagenet_classification/a2q, super_resolution), with their penalty.
"""

import os
from collections.abc import Callable

from benchmarks.peers.problem import Problem


def _integers(bits: int, *, learned: bool, jit: bool = False) -> Callable[[Problem], Callable[[], None]]:
    """Rows with integers.

    Args:
      bits: of weights and of unsigned activations.
      learned: whether a weight scale is a parameter, initialised from the largest weight, or else follows it
        step by step (Brevitas's default).
      jit: whether Brevitas compiles its quantizers to TorchScript, which holds for the whole process.
    """

    def build(problem: Problem):
        _set_jit(jit)
        from brevitas.quant import Int8WeightPerChannelFloat

        scale = {"scaling_impl_type": "parameter_from_stats"} if learned else {}
        outer = Int8WeightPerChannelFloat.let(**scale)
        return _training(problem, outer.let(bit_width=bits), outer, _unsigned(bits))

    return build


def _accumulator_aware(quantizer: str) -> Callable[[Problem], Callable[[], None]]:
    """Rows whose 4-bit weights keep sums with 4-bit activations in 16 bits."""

    def build(problem: Problem):
        _set_jit(False)
        from brevitas import quant

        weights = getattr(quant, quantizer).let(
            bit_width=4, accumulator_bit_width=16, scaling_min_val=1e-8, pre_scaling_min_val=1e-8
        )
        outer = quant.Int8WeightPerChannelFloat
        return _training(problem, weights, outer, _unsigned(4), accumulator_aware=True)

    return build


def _e4m3(problem: Problem):
    """The OCP's format, with scales of the largest value."""
    _set_jit(False)
    from brevitas.quant import float_quant_ocp as ocp

    weights, activations = ocp.Fp8e4m3OCPWeightPerTensorFloat, ocp.Fp8e4m3OCPActPerTensorFloat
    return _training(problem, weights, weights, activations.let(collect_stats_steps=1))


def _set_jit(enabled: bool) -> None:
    """Brevitas reads its switch once, when it is imported."""
    import torch

    os.environ["BREVITAS_JIT"] = str(int(enabled))
    from brevitas import config

    if bool(config.JIT_ENABLED) != enabled:
        raise RuntimeError("rows with and without Brevitas's JIT need processes of their own")
    if enabled and not torch.cuda.is_available():
        # PyTorch's wheels have no LLVM, so that on a CPU fused operations are interpreted: four times slower.
        torch._C._jit_set_texpr_fuser_enabled(False)


def _unsigned(bits: int):
    from brevitas.quant import Uint8ActPerTensorFloat

    return Uint8ActPerTensorFloat.let(bit_width=bits, collect_stats_steps=1)


def _training(problem: Problem, weights, outer_weights, activations, *, accumulator_aware: bool = False):
    """The training with quantizers of the weights of inner layers and of outer ones, and of activations."""
    from functools import partial

    from brevitas import nn as qnn

    from benchmarks.peers.torch_resnet import ResNet, Training

    # The bounds of weights depend on the width of what is multiplied with them, so that it is passed on.
    activation = partial(qnn.QuantReLU, act_quant=activations, return_quant_tensor=accumulator_aware)
    model = ResNet(
        problem,
        stem=partial(qnn.QuantConv2d, weight_quant=outer_weights),
        conv=partial(qnn.QuantConv2d, weight_quant=weights),
        activation=activation,
        linear=partial(qnn.QuantLinear, bias=True, weight_quant=outer_weights),
    )
    return Training(problem, model, penalty=_Penalty(model) if accumulator_aware else None)


class _Penalty:
    """What keeps learned norms under their bounds, collected from all layers while the network is run."""

    def __init__(self, model, strength: float = 1e-3):
        from brevitas.core.scaling.pre_scaling import AccumulatorAwareParameterPreScaling

        self._strength, self._terms = strength, []
        for module in model.modules():
            if isinstance(module, AccumulatorAwareParameterPreScaling):
                module.register_forward_hook(self._collect)

    def _collect(self, module, inputs, output) -> None:
        from brevitas.function import abs_binary_sign_grad

        weights, bits, signed = inputs
        norm = abs_binary_sign_grad(module.restrict_clamp_scaling(module.value))
        bound = module.calc_max_l1_norm(bits, signed) * module.scaling_impl(weights)
        self._terms.append((norm - bound).relu().sum())

    def __call__(self):
        terms, self._terms = self._terms, []
        return self._strength * sum(terms)


CONTENDERS = {
    "Brevitas w4a4, learned scales": _integers(4, learned=True),
    "Brevitas w4a4, learned scales, JIT": _integers(4, learned=True, jit=True),
    "Brevitas w4a4, statistic scales": _integers(4, learned=False),
    "Brevitas w8a8, learned scales": _integers(8, learned=True),
    "Brevitas A2Q 16 bits": _accumulator_aware("Int8AccumulatorAwareWeightQuant"),
    "Brevitas A2Q+ 16 bits": _accumulator_aware("Int8AccumulatorAwareZeroCenterWeightQuant"),
    "Brevitas e4m3": _e4m3,
}
