"""Qwix's quantization-aware training of a network of flax; the stem and the classifier have 8 bits.

w8a8 is its quantized training: weights per channel and activations per example, symmetric, with scales of the
largest value of each step; the forward pass adds integers, gradients are float. XLA compiles no convolution
of 4-bit integers (on a CPU, jaxlib 0.10), so that w4a4 is Qwix's other training, made for LiteRT: fake
quantization of weights per channel and of all activations (an addition's, too) per tensor, asymmetric, with
ranges that are the mean of all steps so far.
"""

from benchmarks.peers.problem import Problem


def _w8a8(problem: Problem):
    import qwix

    rule = qwix.QtRule(weight_qtype="int8", act_qtype="int8")
    return _training(problem, qwix.QtProvider([rule]))


def _w4a4(problem: Problem):
    import qwix

    outer = qwix.QuantizationRule(module_path="stem|classifier", weight_qtype="int8", act_qtype="int8")
    inner = qwix.QuantizationRule(weight_qtype="int4", act_qtype="int4")
    return _training(problem, qwix.OdmlQatProvider([outer, inner]))


def _training(problem: Problem, provider):
    import qwix

    from benchmarks.peers.flax_resnet import ResNet, training

    return training(problem, qwix.quantize_model(ResNet(problem), provider))


CONTENDERS = {"Qwix QAT w4a4": _w4a4, "Qwix QAT w8a8": _w8a8}
