"""HGQ2: gradient-based learning of the width of every weight and activation, on keras with JAX.

Default quantizers: weights `kbi` with a width each, inputs of layers `kif` with a width for each pixel and
channel, the layers' costs (EBOPs) in the loss. Batch norm and addition are keras's own, in float as in the
other rows. The step is one jitted function of keras's stateless interface, which is as fast as
`train_on_batch` and has the augmentation in it. Convolutions are float32 whatever the policy.
"""

import os

from benchmarks.peers.problem import Problem


def _hgq(problem: Problem):
    if problem.dtype != "float32":
        raise NotImplementedError(f"HGQ2's convolutions are float32, not {problem.dtype}")
    os.environ["KERAS_BACKEND"] = "jax"  # Read when keras is imported.
    from benchmarks.peers.jax_training import Training, set_threads

    set_threads(problem)
    import jax
    import keras
    from hgq.config import LayerConfigScope

    from benchmarks.peers.jax_training import cross_entropy

    # The default is for small networks; in the loss of one of this size, nothing else would count.
    with LayerConfigScope(beta0=1e-10):
        model = _resnet(problem)
    optimizer = keras.optimizers.SGD(
        problem.learning_rate, problem.momentum, weight_decay=problem.weight_decay
    )
    optimizer.exclude_from_weight_decay(var_list=[v for v in model.trainable_variables if v.name != "kernel"])
    optimizer.build(model.trainable_variables)

    def update(state, images, labels):
        trained, others, momenta = state

        def loss_of(trained):
            logits, changed, losses = model.stateless_call(
                trained, others, images, training=True, return_losses=True
            )
            return cross_entropy(logits, labels) + sum(losses), changed

        (loss, others), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
        trained, momenta = optimizer.stateless_apply(momenta, gradients, trained)
        return (trained, others, momenta), loss

    variables = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
    return Training(problem, update, jax.tree.map(lambda variable: variable.value, variables))


def _resnet(problem: Problem):
    import keras
    from hgq.layers import QConv2D, QDense

    def convolve(x, features, strides):
        x = QConv2D(features, 3, strides=strides, padding="same", use_bias=False)(x)
        return keras.layers.BatchNormalization(
            momentum=problem.batch_norm_momentum, epsilon=problem.batch_norm_epsilon
        )(x)

    images = keras.Input(problem.images.shape[1:], problem.batch_size)
    x = keras.layers.ReLU()(convolve(images, problem.num_filters, 1))
    for features, strides in problem.blocks:
        branch = keras.layers.ReLU()(convolve(x, features, strides))
        branch = convolve(branch, features, 1)
        missing = features - x.shape[-1]
        if missing:
            padding = ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2))
            x = keras.ops.pad(x[:, ::strides, ::strides], padding)
        x = keras.layers.ReLU()(branch + x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, QDense(problem.num_classes)(x))


CONTENDERS = {"HGQ2": _hgq}
