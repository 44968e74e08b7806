"""Knowledge distillation: a trained network's predictions as soft labels."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from qflax.data.augment import normalize


@flax.struct.dataclass
class Teacher:
    """A trained network; its arrays are replicated over the devices.

    Attributes:
      model: the network.
      mean, std: normalisation of its images.
      variables: of the network.
      weight: of the distillation loss; the loss of the task has the rest.
      temperature: that softens both predictions.
    """

    model: nn.Module = flax.struct.field(pytree_node=False)
    mean: tuple[float, ...] = flax.struct.field(pytree_node=False)
    std: tuple[float, ...] = flax.struct.field(pytree_node=False)
    variables: dict
    weight: jax.Array
    temperature: jax.Array

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits [batch, classes] of images [batch, height, width, channels] with values 0..255."""
        return self.model.apply(self.variables, normalize(images, self.mean, self.std), train=False)


def distillation_loss(logits: jax.Array, teacher_logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each example (Hinton et al. 2015, section 2).

    The factor keeps the gradient's size when the temperature changes.

    Args:
      logits: [batch, classes], of the student.
      teacher_logits: [batch, classes]; they get no gradient.
      temperature: T, positive.

    Returns:
      [batch].
    """
    targets = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    predictions = jax.nn.log_softmax(logits / temperature)
    return jnp.square(temperature) * optax.losses.kl_divergence_with_log_targets(predictions, targets)
