"""Which backend serves this array? Found by entry point, imported only when its library is in use."""

from __future__ import annotations

import functools
import importlib
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from array_api_compat import array_namespace

from diveq_core.arrays.backend import Backend
from diveq_core.arrays.rows import Array, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

P = ParamSpec("P")
T = TypeVar("T")

GROUP = "diveq_core.backends"

_backends: list[Backend] = []
_targets: dict[str, str] = {}
_failed: dict[str, ImportError] = {}
_this = sys.modules[__name__]

if TYPE_CHECKING:
    refreshed: tuple[Backend, ...]


def __getattr__(name: str) -> Any:
    # An attribute rather than a function: torch.compile evaluates module attributes while tracing, where it
    # could not trace the import of a backend. So the first call ever may already be a compiled one.
    if name == "refreshed":
        return _load_backends()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _load_backends() -> tuple[Backend, ...]:
    """All backends whose library has been imported by now."""
    if not _targets:
        _targets.update({entry.name: entry.value for entry in entry_points(group=GROUP)})
    for library in [name for name in _targets if name in sys.modules]:
        module, _, attribute = _targets[library].partition(":")
        try:
            # Behind what was registered by hand, whenever its library is imported.
            _add(getattr(importlib.import_module(module), attribute), len(_backends))
        except ImportError as error:
            # A library too old for its backend, say, is no hindrance to the use of another one.
            _failed[library] = error
    return tuple(_backends)


def register(backend: Backend) -> None:
    """Add a backend by hand, before all others; those of entry points come after.

    Parameters
    ----------
    backend : Backend
        Serves the arrays that it owns from now on. One that was added already stays where it is.

    Raises
    ------
    TypeError
        If it is not an instance of `Backend`.
    """
    _add(backend, 0)


def _add(backend: Backend, position: int) -> None:
    if not isinstance(backend, Backend):
        raise TypeError(f"register: expected a diveq_core.Backend, got {describe(backend)}")
    if backend not in _backends:
        _backends.insert(position, backend)


def backend_of(function: str, **arrays: Array) -> Backend:
    """The one backend that serves all the arrays.

    Raises
    ------
    TypeError
        If one is not an array, or if they belong to different libraries.
    ImportError
        If the library's backend cannot be imported.
    """
    lib: Backend | None = None
    kind: type | None = None
    for name, x in arrays.items():
        # What is of one type is of one library.
        served = lib if lib is not None and type(x) is kind else _registered(x) or _standard(function, name, x)
        unfit = served.unfit(x)
        if unfit is not None:
            raise TypeError(f"{function}: {name} must be a dense array with one size along each axis, got {unfit}")
        if lib is None:
            lib, kind = served, type(x)
        elif served is not lib:
            raise TypeError(f"{function}: expected all arrays of one library, got {_libraries(function, arrays)}")
    assert lib is not None
    return lib


class _Standard(Backend):
    """A library by the standard alone; one that computes by NumPy, as array-api-strict does, warns as NumPy does."""

    def quiet(self, function: Callable[..., Any]) -> Callable[..., Any]:
        numpy: Any = sys.modules.get("numpy")
        return function if numpy is None else numpy.errstate(all="ignore")(function)


def _libraries(function: str, arrays: dict[str, Array]) -> str:
    served = {name: _registered(x) or _standard(function, name, x) for name, x in arrays.items()}
    return ", ".join(f"{name} of {lib.name}" for name, lib in served.items())


def quiet(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a public function: it, and a pullback that it gives, run by `Backend.quiet` of the arrays' library."""

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        lib = _of_any((*args, *options.values()))
        if lib is None:
            return function(*args, **options)
        out = lib.quiet(function)(*args, **options)
        if type(out) is tuple and callable(out[-1]):
            return cast("T", (*out[:-1], lib.quiet(out[-1])))
        return out

    return call


def _of_any(args: tuple[object, ...]) -> Backend | None:
    """The backend of the first array among them, also in a tuple or dictionary of arrays."""
    arrays = list(_arrays(args))
    # Loading what is new takes longer, and what is no array would ask for it.
    for find in (_known, _registered, _first_of_standard):
        for x in arrays:
            lib = find(x)
            if lib is not None:
                return lib
    return None


def _arrays(args: Any) -> Iterator[object]:
    for x in args:
        if isinstance(x, dict):
            yield from x.values()
        elif isinstance(x, tuple):
            yield from _arrays(x)
        else:
            yield x


def _first_of_standard(x: object) -> Backend | None:
    """The backend of a library that has none of its own, whose first array this may be."""
    if not hasattr(type(x), "__array_namespace__"):
        return None
    try:
        return _standard("quiet", "x", x)
    except (TypeError, ImportError):
        # The function itself refuses it, by its own name.
        return None


def _known(x: object) -> Backend | None:
    for backend in _backends:
        if backend.owns(x):
            return backend
    return None


def _registered(x: object) -> Backend | None:
    lib = _known(x)
    if lib is not None:
        return lib
    for backend in _this.refreshed:
        if backend.owns(x):
            return backend
    return None


def _standard(function: str, name: str, x: Array) -> Backend:
    """A backend by the standard alone, for a library that has none of its own."""
    refused = TypeError(
        f"{function}: {name} must be an array of a library that follows the array API standard, got {describe(x)}"
    )
    try:
        namespace: ModuleType = array_namespace(x)
    except TypeError:
        raise refused from None
    # "torch" of "array_api_compat.torch", "jax" of "jax.numpy".
    for library in _targets.keys() & set(namespace.__name__.split(".")):
        if library in _failed:
            error = _failed[library]
            raise ImportError(f"{function}: the backend of {library} could not be imported: {error}") from error
        raise refused  # by the library's own backend, as NumPy's does a masked array
    for backend in _backends:
        if backend.xp is namespace:
            return backend
    backend = _Standard(namespace, namespace.__name__.removeprefix("array_api_compat."))
    _add(backend, len(_backends))
    return backend
