"""The network of the contenders that quantize one of flax, and its training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.peers.jax_training import Training, cross_entropy, set_threads
from benchmarks.peers.problem import Problem


class ResNet(nn.Module):
    """The network of a problem, in float."""

    problem: Problem

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalised images [batch, height, width, 3] to float32 logits [batch, num_classes]."""
        x = nn.relu(self._convolve(x, "stem", self.problem.num_filters, 1, train))
        for i, (features, strides) in enumerate(self.problem.blocks):
            branch = nn.relu(self._convolve(x, f"block{i}_conv1", features, strides, train))
            branch = self._convolve(branch, f"block{i}_conv2", features, 1, train)
            missing = features - x.shape[-1]
            padding = ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2))
            x = nn.relu(branch + jnp.pad(x[:, ::strides, ::strides], padding))
        classifier = nn.Dense(self.problem.num_classes, dtype=self.problem.dtype, name="classifier")
        return classifier(x.mean((1, 2))).astype(jnp.float32)

    def _convolve(self, x: jax.Array, name: str, features: int, strides: int, train: bool) -> jax.Array:
        """A 3x3 convolution and its norm."""
        dtype = self.problem.dtype
        conv = nn.Conv(features, (3, 3), strides=strides, padding=1, use_bias=False, dtype=dtype, name=name)
        norm = nn.BatchNorm(
            use_running_average=not train,
            momentum=self.problem.batch_norm_momentum,
            epsilon=self.problem.batch_norm_epsilon,
            dtype=dtype,
            name=f"{name}_norm",
        )
        return norm(conv(x))


def training(problem: Problem, model: nn.Module) -> Training:
    """Of a `ResNet`, or of what a package makes of it."""
    set_threads(problem)

    def initialize():
        images = jnp.zeros((problem.batch_size, *problem.images.shape[1:]))
        variables = model.init(jax.random.key(0), images, train=True)
        return variables.pop("params"), variables

    parameters, others = jax.jit(initialize)()
    kernels = jax.tree.map(lambda parameter: parameter.ndim > 1, parameters)
    optimizer = optax.chain(
        optax.add_decayed_weights(problem.weight_decay, kernels),
        optax.sgd(problem.learning_rate, problem.momentum),
    )

    def update(state, images, labels):
        parameters, others, momenta = state

        def loss_of(parameters):
            variables = {"params": parameters, **others}
            logits, changed = model.apply(variables, images, train=True, mutable=list(others))
            return cross_entropy(logits, labels), changed

        (loss, others), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters)
        changes, momenta = optimizer.update(gradients, momenta, parameters)
        return (optax.apply_updates(parameters, changes), others, momenta), loss

    return Training(problem, update, (parameters, others, optimizer.init(parameters)))
