"""The layers for NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from diveq_core.layers.explicit import ExplicitLayer


class VectorQuantizer(ExplicitLayer):
    """`diveq_core.layers.explicit.ExplicitLayer` for NumPy.

    Parameters
    ----------
    dim, codebook_size, estimator, **options
        As in `diveq_core.layers.Settings`.
    dtype : dtype
        Of the state, float32 or wider.
    rng : numpy.random.Generator, optional
    all_reduce : callable, optional

    Examples
    --------
    >>> import numpy as np
    >>> from diveq_numpy import VectorQuantizer
    >>> rng = np.random.default_rng(0)
    >>> vq = VectorQuantizer(8, 32, rng=rng)
    >>> z = rng.standard_normal((64, 8), dtype=np.float32)
    >>> out = vq.forward(z)
    >>> g_z = vq.backward(2 * (out.z_q - z) / z.size)
    >>> vq.step(1e-3)
    >>> vq.update()
    >>> tokens = vq.encode(z)
    >>> bool((vq.decode(tokens) == vq.forward(z, train=False).z_q).all())
    True
    """

    @staticmethod
    def like(dtype: Any) -> np.ndarray:
        return np.zeros((), np.float32 if dtype is None else dtype)
