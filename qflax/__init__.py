"""Training of quantized networks in JAX and Flax: `quantize` a Linen model, `describe` what came of it."""

_PUBLIC = ("quantize", "describe")


def __getattr__(name: str):
    """What users need first; imported when it is used, as Flax takes seconds."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qflax' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
    from qflax import linen

    return getattr(linen, name)
