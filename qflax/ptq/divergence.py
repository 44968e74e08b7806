"""How far a quantized network's outputs are from the float network's."""

import numpy as np

NO_LABEL = -1


def compare_outputs(reference: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """Compares logits [examples, classes] with the float network's.

    Args:
      reference: the float network's.
      logits: the quantized one's.
      labels: int [examples], `NO_LABEL` where there is none.

    Returns:
      `divergence`: mean KL(reference || logits) of the predictions, in nats; `agreement`: share of examples
      with the same largest output; `accuracy`: share of the labelled examples that are right, or None.
    """
    p, q = _log_softmax(reference), _log_softmax(logits)
    choices, labelled = np.argmax(logits, -1), labels != NO_LABEL
    return {
        "divergence": max(float(np.mean(np.sum(np.exp(p) * (p - q), -1))), 0.0),
        "agreement": float(np.mean(choices == np.argmax(reference, -1))),
        "accuracy": float(np.mean((choices == labels)[labelled])) if labelled.any() else None,
    }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    # In float64: divergences of wide quantizers are differences of nearly equal numbers.
    shifted = logits.astype(np.float64) - np.max(logits, -1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), -1, keepdims=True))
