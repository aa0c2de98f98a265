"""A layer for Keras 3, on its JAX and torch backends."""

from diveq_keras.layers import VectorQuantizer

__all__ = ["VectorQuantizer"]
