"""Files of layers and tokenizers: safetensors hold the arrays under their names, and settings as JSON in the header."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from array import array
from typing import TYPE_CHECKING, Any, TypeVar

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
    from collections.abc import Callable
    from types import ModuleType

    from diveq_core.estimators.base import Shape

T = TypeVar("T")

LAYER, TOKENIZER = "diveq_core.layer.1", "diveq_core.tokenizer.1"
"""What a header says of its file; the number grows when an older version could not read it."""

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
    """Write a layer's arrays of NumPy and settings to a file."""
    write_file(path, {LAYER: to_text(settings)}, arrays)


def read(path: Any) -> tuple[Settings, dict[str, Any]]:
    """Settings and arrays of NumPy from a file that `write` wrote."""
    name, header, arrays = read_file(path, LAYER)
    return checked_layer(name, header, arrays), arrays


def checked_layer(name: str, header: dict[str, str], arrays: dict[str, Any]) -> Settings:
    """The settings of a layer's file, whose arrays fit them."""
    settings = checked_text(name, from_text, header[LAYER])
    check_arrays(name, arrays, settings.shapes)
    return settings


def write_file(path: Any, header: dict[str, str], arrays: dict[str, Any]) -> None:
    """Write arrays of NumPy and a header of one entry to a file.

    Of one, since several come in any order, and the same arrays are to give the same bytes.
    """
    write_whole(path, _safetensors("save").save(arrays, header))


def write_whole(path: Any, data: bytes) -> None:
    """Write a file, which is whole or, if anything fails, as it was."""
    folder = os.path.dirname(os.path.abspath(os.fspath(path)))
    handle, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # As a new file has it, where the temporary one is for its owner alone.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read_file(path: Any, *formats: str) -> tuple[str, dict[str, str], dict[str, Any]]:
    """The name of a file of one of some formats, its header, and its arrays."""
    _safetensors("load")
    from safetensors import SafetensorError, safe_open

    name, kinds = os.fspath(path), " or ".join(format.split(".")[1] for format in formats)
    try:
        with safe_open(name, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
    except SafetensorError as error:
        raise ValueError(f"load: {name} must be a whole safetensors file of a {kinds}, got {error}") from error
    if not any(format in header for format in formats):
        ours = [key for key in header if key.startswith("diveq_core.")]
        raise ValueError(
            f"load: {name} must be a file that a {kinds}'s save wrote, with {' or '.join(formats)} in its header, got "
            f"{', '.join(ours or header) or 'a header without it'}"
            f"{'; another version of diveq_core may read it' if ours else ''}"
        )
    return name, header, arrays


def checked_text(name: str, read: Callable[[str], T], text: str) -> T:
    """What the text of a header says, by a function that reads it."""
    try:
        return read(text)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"load: {name} must hold the settings that save wrote, got {text[:80]!r}: {error}") from error


def check_arrays(name: str, arrays: dict[str, Any], shapes: dict[str, Shape]) -> None:
    """Refuse arrays that are not those of a state, finite numbers of these shapes."""
    got = {key: tuple(x.shape) for key, x in sorted(arrays.items())}
    if got != shapes:
        raise ValueError(f"load: {name} must hold the arrays {shapes}, got {got}")
    for key, x in arrays.items():
        kind = {"steps": "i", "started": "b"}.get(key, "f")
        if x.dtype.kind != kind or not (x == x).all() or abs(x.astype(float)).max() == math.inf:
            raise ValueError(
                f"load: {key} of {name} must be finite numbers of kind {kind!r}, got {x.dtype}"
                f"{'' if x.dtype.kind != kind else ' with NaN or infinity'}"
            )


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
