"""Files of layers: one safetensors file holds the arrays under their names, and the settings as JSON in its header."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from array import array
from typing import TYPE_CHECKING, Any

from diveq_core.arrays.rows import describe
from diveq_core.estimators.custom_radius import CustomRadius
from diveq_core.estimators.distance import NSVQ, DiVeQ, DiVeQDetach
from diveq_core.estimators.fsq import FSQ
from diveq_core.estimators.gumbel import GumbelST
from diveq_core.estimators.radial import Radial
from diveq_core.estimators.radii import Cosine, Mahalanobis, PNorm, Power, PseudoHuber
from diveq_core.estimators.rotation import Rotation
from diveq_core.estimators.space_filling import SFDiVeQ, SFDiVeQDetach
from diveq_core.estimators.straight_through import STE
from diveq_core.layers.settings import Settings

if TYPE_CHECKING:
    from types import ModuleType

_FORMAT = "diveq_core.layer.1"

_VALUES = {
    kind.__name__: kind
    for kind in (
        *(STE, NSVQ, DiVeQ, DiVeQDetach, Radial, Rotation, SFDiVeQ, SFDiVeQDetach, FSQ, GumbelST),
        *(Power, PseudoHuber, PNorm, Mahalanobis, Cosine),
    )
}


def to_text(settings: Settings) -> str:
    """Settings as JSON."""
    return json.dumps({name: _written(value) for name, value in settings.given().items()}, sort_keys=True)


def from_text(text: str) -> Settings:
    """Settings from what `to_text` gave."""
    return Settings(**{name: _read(value) for name, value in json.loads(text).items()})


def write(path: Any, settings: Settings, arrays: dict[str, Any]) -> None:
    """Write arrays of NumPy and settings to a file, which is whole or, if anything fails, as it was."""
    # One entry, since several come in any order, and the same layer is to give the same bytes.
    data = _safetensors("save").save(arrays, {_FORMAT: to_text(settings)})
    folder = os.path.dirname(os.path.abspath(os.fspath(path)))
    handle, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # As a new file has it, where the temporary one is for its owner alone.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read(path: Any) -> tuple[Settings, dict[str, Any]]:
    """Settings and arrays of NumPy from a file that `write` wrote."""
    _safetensors("load")
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    try:
        with safe_open(name, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
    except SafetensorError as error:
        raise ValueError(f"load: {name} must be a safetensors file of a layer, got {error}") from error
    if _FORMAT not in metadata:
        raise ValueError(
            f"load: {name} must be a file that a layer's save wrote, with {_FORMAT} in its header, got "
            f"{', '.join(metadata) or 'a header without it'}"
        )
    settings = _settings(name, metadata[_FORMAT])
    if {key: tuple(x.shape) for key, x in arrays.items()} != settings.shapes:
        raise ValueError(f"load: {name} must hold the arrays {settings.shapes}, got other ones")
    for key, x in arrays.items():
        kind = {"steps": "i", "started": "b"}.get(key, "f")
        if x.dtype.kind != kind or not (x == x).all() or abs(x.astype(float)).max() == math.inf:
            raise ValueError(
                f"load: {key} of {name} must be finite numbers of kind {kind!r}, got {x.dtype}"
                f"{'' if x.dtype.kind != kind else ' with NaN or infinity'}"
            )
    return settings, arrays


def _settings(name: str, text: str) -> Settings:
    try:
        return from_text(text)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"load: {name} must hold the settings of a layer, got {text[:80]!r}: {error}") from error


def _safetensors(function: str) -> ModuleType:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(f"{function}: files need safetensors; pip install 'diveq-core[files]'") from error
    return safetensors.numpy


def _written(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, CustomRadius) or callable(value):
        raise TypeError(f"save: a file holds numbers, not functions, got {describe(value)}; use a radius by name")
    if isinstance(value, Mahalanobis):
        # Doubles, which JSON gives back bit for bit.
        return {"name": "Mahalanobis", "matrix": _doubles(value)}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return list(value) if isinstance(value, tuple) else value
    name = type(value).__name__
    if _VALUES.get(name) is not type(value):
        raise TypeError(f"save: the estimator must be one of {', '.join(_VALUES)}, got {describe(value)}")
    fields = [field.name for field in dataclasses.fields(value) if field.init]
    return {"name": name} | {field: _written(getattr(value, field)) for field in fields}


def _doubles(radius: Mahalanobis) -> list[list[float]]:
    flat: list[float] = array("d", radius.entries).tolist()
    return [flat[row : row + radius.width] for row in range(0, len(flat), radius.width)]


def _read(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    fields = {name: _read(x) for name, x in value.items() if name != "name"}
    if value.get("name") not in _VALUES:
        raise ValueError(f"load: the estimator must be one of {', '.join(_VALUES)}, got {value.get('name')!r}")
    if value["name"] == "Mahalanobis":
        import numpy

        fields["matrix"] = numpy.asarray(fields["matrix"])
    return _VALUES[value["name"]](**fields)
