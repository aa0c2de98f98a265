"""The one option of the library: whether optional kernels may search."""

from __future__ import annotations

import os

_enabled = os.environ.get("DIVEQ_CORE_OPTIONAL_KERNELS", "1") != "0"


def optional_kernels() -> bool:
    """Whether kernels of optional packages may take part in a search.

    These are faiss's in NumPy and in PyTorch on a CPU, Triton's in PyTorch and Pallas's in JAX on a GPU. All searches
    keep to one statement of accuracy (see `nearest`), so the option changes speed, and tokens only where two codewords
    are equally near to rounding.

    Returns
    -------
    bool
        True unless `set_optional_kernels` or the environment variable ``DIVEQ_CORE_OPTIONAL_KERNELS=0`` said otherwise.

    Examples
    --------
    >>> import diveq_core as dq
    >>> dq.optional_kernels()
    True
    """
    return _enabled


def set_optional_kernels(enabled: bool, /) -> bool:
    """Allow or forbid kernels of optional packages, in this process, from the next search on.

    Parameters
    ----------
    enabled : bool

    Returns
    -------
    bool
        What was set before.

    Raises
    ------
    TypeError
        If it is not a bool.

    Examples
    --------
    >>> import diveq_core as dq
    >>> before = dq.set_optional_kernels(False)
    >>> dq.optional_kernels()
    False
    >>> dq.set_optional_kernels(before)
    False
    """
    global _enabled
    if not isinstance(enabled, bool):
        raise TypeError(f"set_optional_kernels: enabled must be a bool, got {enabled!r}")
    before, _enabled = _enabled, enabled
    return before
