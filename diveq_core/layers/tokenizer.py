r"""A trained quantizer as a value: vectors to tokens and back, in any array library.

.. math:: i = \operatorname{encode}(z), \qquad z_q = \operatorname{decode}(i)
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from diveq_core.arrays.checks import check_floating, checked_count, checked_indices
from diveq_core.arrays.registry import backend_of, quiet
from diveq_core.arrays.rows import describe
from diveq_core.codebook.linear import LinearCodebook, linear_codebook
from diveq_core.estimators.base import Single, check_estimator
from diveq_core.estimators.gumbel import GumbelST
from diveq_core.estimators.product import Product
from diveq_core.estimators.residual import Residual
from diveq_core.estimators.space_filling import SFDiVeQDetach
from diveq_core.estimators.straight_through import STE
from diveq_core.layers import file, hard, step
from diveq_core.layers.results import Point
from diveq_core.layers.run import Step, checked_state
from diveq_core.layers.settings import Settings
from diveq_core.layers.words import words

if TYPE_CHECKING:
    from diveq_core.arrays.backend import Backend
    from diveq_core.arrays.rows import Array
    from diveq_core.estimators.base import Quantizer
    from diveq_core.layers.words import State

# What the index dtype of every library holds.
_LARGEST = (1 << 31) - 1


class Tokenizer:
    r"""A trained quantizer: hard, deterministic, without a state.

    .. math:: z_q = \operatorname{decode}(\operatorname{encode}(z))

    Parameters
    ----------
    codebook : array (K, D), tuple of arrays or None
        Or what the `Residual` or `Product` takes; a `LinearCodebook`, which is multiplied out; None for `FSQ`.
    estimator : Estimator, Residual or Product
        A single one, in stages, in groups, or in groups of stages. What it does in training does not matter here,
        but that a space-filling one makes a token a segment and a position.
    cosine : bool
        Whether vectors and codewords are normalized first, each group by itself, so that z_q consists of unit vectors.
    channel_axis : int
        The axis along which the vectors lie: -1 for (..., D), 1 for images (B, D, H, W).
    not_finite : {"mark", "skip", "refuse"}
        What becomes of a vector that is not finite: token -1, which decodes to NaN; token -1, which decodes to zeros;
        or a ValueError.
    position_bits : int, optional
        On a curve, how many bits of a position a token keeps: it is then one integer, the segment times
        ``2^bits`` plus the position in steps of ``1 / (2^bits - 1)``. Without it a token is a `Point`.

    Raises
    ------
    TypeError, ValueError
        If shapes, dtypes or options do not fit, or the codebook is not finite.

    Notes
    -----
    The arrays are held in float32, or in float64 if the codebook is. They are brought to the library and the device of
    the vectors at the first call, and kept there; a library without float64 takes them in float32. Changing the array
    that was given later changes nothing here.

    Examples
    --------
    >>> import numpy as np
    >>> import diveq_core as dq
    >>> tokenizer = dq.Tokenizer(np.array([[0.0, 0.0], [1.0, 1.0]]))
    >>> tokens = tokenizer.encode(np.array([[0.2, 0.1], [0.9, 1.2]]))
    >>> tokens, tokenizer.decode(tokens)
    (array([0, 1]), array([[0., 0.],
           [1., 1.]]))
    >>> tokenizer
    Tokenizer(dim=2, codebook_size=2, bits=1)
    """

    settings: Settings
    position_bits: int | None

    @quiet
    def __init__(
        self,
        codebook: Any = None,
        estimator: Quantizer | None = None,
        *,
        cosine: bool = False,
        channel_axis: int = -1,
        not_finite: str = "mark",
        position_bits: int | None = None,
    ) -> None:
        estimator = STE() if estimator is None else estimator
        check_estimator("Tokenizer", estimator)
        single, heads, stages = _parts(estimator)
        options: dict[str, Any] = {"heads": heads, "stages": stages, "cosine": cosine}
        options |= {"channel_axis": channel_axis, "not_finite": not_finite}
        state: State = {}
        if single.codebook_axes and codebook is not None:
            codebook = linear_codebook(codebook) if isinstance(codebook, (tuple, LinearCodebook)) else codebook
            lib = backend_of("Tokenizer", codebook=codebook)
            check_floating(lib, "Tokenizer", codebook=codebook)
            estimator.check("Tokenizer", lib, None, tuple(codebook.shape))
        elif single.codebook_axes:
            estimator.check("Tokenizer", None, None, None)  # type: ignore[arg-type]
        elif codebook is not None:
            raise TypeError(f"Tokenizer: codebook must be None, since FSQ has none, got {describe(codebook)}")
        if codebook is None:
            dim, size = len(getattr(single, "levels", ())) * heads, None
        else:
            axes = estimator.codebook_axes
            options["shared"] = codebook.ndim < axes
            if stages > 1 and codebook.ndim == axes:
                # Spare stages are not used.
                codebook = codebook[:stages, ...] if heads == 1 else codebook[:, :stages, ...]
            elif stages > 1 and heads > 1:
                codebook = codebook[:stages, ...]
            dim, size = codebook.shape[-1] * heads, codebook.shape[-2]
            state["codewords"] = _as_numpy("codebook", codebook)
        self._take(_plain(Settings(dim, size, _hard(single), **options)), state, position_bits)

    @classmethod
    @quiet
    def of_state(cls, settings: Settings, state: State, *, position_bits: int | None = None) -> Self:
        """The tokenizer of a layer's settings and state: ``decode(encode(z))`` is the layer's output in evaluation.

        Parameters
        ----------
        settings, state
            As in `diveq_core.layers.encode`.
        position_bits
            As above.
        """
        _, state = checked_state("Tokenizer", settings, state, whole=False)
        arrays = {}
        for name, x in state.items():
            if name not in ("embedding", "weight"):
                arrays[name] = _as_numpy(name, x)
            elif name == "embedding":
                lib = backend_of("Tokenizer", **{name: x})
                arrays["codewords"] = _as_numpy("codewords", words(lib, settings, state)[0])
        self = cls.__new__(cls)
        self._take(_plain(settings), arrays, position_bits)
        return self

    def _take(self, settings: Settings, arrays: State, position_bits: int | None) -> None:
        """Hold copies of arrays of NumPy, at least in float32."""
        self.settings, self.position_bits, self._arrays = settings, position_bits, {}
        for name in settings.token_shapes:
            lib = backend_of("Tokenizer", **{name: arrays[name]})
            if not lib.all_finite(arrays[name]):
                raise ValueError(f"Tokenizer: {name} must be finite, got NaN or infinity")
            self._arrays[name] = lib.copy(lib.astype(arrays[name], lib.compute_dtype(arrays[name].dtype)))
        self._placed: dict[tuple[str, str], tuple[State, hard.Books | None]] = {}
        if position_bits is None:
            return
        self.position_bits = checked_count("Tokenizer", "position_bits", position_bits)
        if not settings.on_curve:
            raise ValueError(
                f"Tokenizer: position_bits must be None but on a curve, where tokens have positions, got "
                f"{position_bits}"
            )
        if settings.token_count << self.position_bits > _LARGEST + 1:
            raise ValueError(
                f"Tokenizer: position_bits must keep tokens of {settings.token_count} segments below {_LARGEST + 1}, "
                f"got {position_bits}"
            )

    @property
    def token_count(self) -> int:
        """How many values a token takes, in each group and stage."""
        return self.settings.token_count << (self.position_bits or 0)

    @property
    def bits(self) -> float:
        """Bits per vector; of a curve without ``position_bits`` those of the segment alone."""
        return math.prod(self.settings.axes) * math.log2(self.token_count)

    @property
    def codebook(self) -> Any:
        """The codewords as an array of NumPy, a copy; None for `FSQ`."""
        return self._arrays["codewords"].copy() if "codewords" in self._arrays else None

    @property
    def arrays(self) -> State:
        """What it holds, as arrays of NumPy; do not write them."""
        return self._arrays

    def of_rows(self) -> Self:
        """The same for vectors along the last axis, of which those that are not finite are marked."""
        other = copy.copy(self)
        other.settings = replace(self.settings, channel_axis=-1, not_finite="mark")
        return other

    @quiet
    def encode(self, z: Array, mask: Array | None = None) -> Any:
        """Tokens of vectors.

        Parameters
        ----------
        z : array (..., D)
            Vectors, along ``channel_axis``, in any real floating dtype.
        mask : bool array (...), optional
            Which vectors there are; the others give -1.

        Returns
        -------
        integer array (...), or Point
            With an axis for groups and one for stages at the end, as far as there are several.

        Raises
        ------
        TypeError, ValueError
            If library, dtype or shape does not fit; if a vector is refused.
        """
        lib = backend_of("encode", z=z)
        state, books = self._placed_at(lib, z)
        return self._joined(lib, Step("encode", self.settings, state, z, mask, whole=False).tokens(books))

    @quiet
    def decode(self, tokens: Any, *, dtype: Any = None) -> Array:
        """Vectors from tokens.

        Parameters
        ----------
        tokens : integer array (...), or Point
            As `encode` gives them. -1 gives NaN, or zeros with ``not_finite="skip"``; in a stage after the first it
            adds nothing.
        dtype : optional
            The library's floating dtype of the result, by default that of the arrays.

        Returns
        -------
        array (..., D)

        Raises
        ------
        TypeError, ValueError
            As `diveq_core.decode`.
        """
        found = self._parted("decode", tokens)
        like = found.segments if isinstance(found, Point) else found
        state, _ = self._placed_at(backend_of("decode", tokens=like), like)
        return step.decode(self.settings, state, found, dtype=dtype)

    @quiet
    def distortion(self, z: Array, mask: Array | None = None) -> Array:
        r"""What quantizing costs: the mean squared distance of vectors to what they decode to.

        .. math:: \frac1N \sum_n \|z_n - \operatorname{decode}(\operatorname{encode}(z_n))\|^2

        Parameters
        ----------
        z, mask
            As in `encode`. Vectors that are masked or not finite are left out.

        Returns
        -------
        array ()
            In at least float32; NaN where no vector is left.
        """
        lib = backend_of("distortion", z=z)
        tokens = self.encode(z, mask)
        dtype = lib.compute_dtype(z.dtype)
        d = lib.astype(z, dtype) - self.decode(tokens, dtype=dtype)
        first = tokens.segments if isinstance(tokens, Point) else tokens
        for _ in self.settings.axes:
            first = first[..., 0]
        squares = lib.xp.sum(d * d, axis=self.settings.channel_axis)
        kept = first >= 0
        total = lib.xp.sum(lib.xp.where(kept, squares, lib.xp.zeros_like(squares)))
        return total / lib.xp.sum(lib.xp.astype(kept, dtype))

    @quiet
    def usage(self, tokens: Any) -> Array:
        """How often each codeword was chosen, or segment or code, (K,), with axes for groups and stages before.

        Parameters
        ----------
        tokens
            As `encode` gives them; -1 is not counted.
        """
        return step.usage(self.settings, self._parted("usage", tokens))

    @quiet
    def perplexity(self, tokens: Any) -> Array:
        """Effective number of codewords in use, for each codebook; `diveq_core.layers.perplexity`."""
        return step.perplexity(self.settings, self._parted("perplexity", tokens))

    def save(self, path: Any) -> None:
        """Write settings and arrays to one safetensors file; it appears whole or not at all."""
        settings = file.to_text(self.settings)
        header = {"settings": json.loads(settings), "sha256": _digest(settings, self._arrays)}
        if self.position_bits is not None:
            header["position_bits"] = self.position_bits
        file.write_file(path, {file.TOKENIZER: json.dumps(header, sort_keys=True)}, self._arrays)

    @classmethod
    def load(cls, path: Any) -> Self:
        """The tokenizer that a file holds, or that of the layer that it holds.

        Parameters
        ----------
        path
            Of a file that `save` wrote, a tokenizer's or a layer's.

        Raises
        ------
        ValueError
            If it is cut off, changed, of another kind or of a newer version.
        """
        name, header, arrays = file.read_file(path, file.TOKENIZER, file.LAYER)
        if file.LAYER in header:
            return cls.of_state(file.checked_layer(name, header, arrays), arrays)
        settings, digest, position_bits = file.checked_text(name, _read_header, header[file.TOKENIZER])
        file.check_arrays(name, arrays, settings.token_shapes)
        if digest != _digest(file.to_text(settings), arrays):
            raise ValueError(f"load: {name} must be as save wrote it, got other settings or numbers")
        self = cls.__new__(cls)
        self._take(settings, arrays, position_bits)
        return self

    def _placed_at(self, lib: Backend, like: Array) -> tuple[State, hard.Books | None]:
        """The arrays in a library, on the device of an array of it, and its codebooks as the search takes them."""
        place = lib.place(like)
        key = (lib.name, str(place))
        placed = self._placed.get(key)
        if placed is None:
            state = {name: lib.copy(lib.xp.asarray(x, **place)) for name, x in self._arrays.items()}
            books = None
            if self.settings.searches:
                books = hard.prepared(lib, self.settings, words(lib, self.settings, state)[0])
            placed = state, books
            # What is made while a function is traced belongs to the trace.
            if lib.is_concrete(like) and all(lib.is_concrete(x) for x in state.values()):
                self._placed[key] = placed
        return placed

    def _joined(self, lib: Backend, tokens: Any) -> Any:
        """The tokens of a curve as single integers."""
        if self.position_bits is None:
            return tokens
        steps = (1 << self.position_bits) - 1
        whole = lib.xp.round(tokens.positions * steps)
        there = tokens.segments >= 0
        position = lib.astype(lib.xp.where(there, whole, lib.xp.zeros_like(whole)), tokens.segments.dtype)
        return lib.xp.where(there, tokens.segments * (steps + 1) + position, tokens.segments)

    def _parted(self, function: str, tokens: Any) -> Any:
        """The segments and positions of a curve, of tokens that are single integers."""
        if self.position_bits is None:
            return tokens
        lib = backend_of(function, tokens=tokens)
        tokens = checked_indices(lib, function, tokens, self.token_count, bound="token_count")
        count = 1 << self.position_bits
        segments = tokens // count
        dtype = self._placed_at(lib, tokens)[0]["codewords"].dtype
        return Point(segments, lib.xp.astype(tokens - segments * count, dtype) / (count - 1))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_placed": {}}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokenizer):
            return NotImplemented
        mine, theirs = ((x.position_bits, file.to_text(x.settings)) for x in (self, other))
        return mine == theirs and _digest("", self._arrays) == _digest("", other._arrays)

    def __hash__(self) -> int:
        return hash(_digest(file.to_text(self.settings), self._arrays))

    def __repr__(self) -> str:
        given = self.settings.given()
        shown = [
            f"{name}={value!r}" for name, value in given.items() if name not in _HIDDEN and value not in (None, STE())
        ]
        if self.position_bits is not None:
            shown.append(f"position_bits={self.position_bits}")
        return f"Tokenizer({', '.join(shown)}, bits={self.bits:.4g})"


_HIDDEN = ("codebook_update", "init", "replace_every")


def _as_numpy(name: str, x: Array) -> Array:
    """An array of any library as one of NumPy."""
    lib = backend_of("Tokenizer", **{name: x})
    x = lib.stop_gradient(x)
    if not lib.is_concrete(x):
        raise ValueError(f"Tokenizer: {name} must have values, got an array without: it is traced, or of shapes alone")
    return lib.to_numpy(x)


def _parts(estimator: Quantizer) -> tuple[Quantizer, int, int]:
    """The single estimator in groups of stages, and their numbers."""
    single: Any = estimator
    heads = stages = 1
    if isinstance(single, Product):
        single, heads = single.estimator, single.groups
    if isinstance(single, Residual):
        single, stages = single.estimator, single.stages
    if not isinstance(single, Single) or not single.keeps_space:
        raise TypeError(
            f"Tokenizer: estimator must be a single one that takes vectors, a Residual, a Product, or a Product of a "
            f"Residual of one, got {describe(estimator)}"
        )
    return single, heads, stages


def _hard(estimator: Any) -> Quantizer:
    """An estimator of the same tokens, without options of training."""
    if not estimator.codebook_axes:
        return estimator
    if not estimator.keeps_space:
        return GumbelST()
    return SFDiVeQDetach() if estimator.corners > 1 else STE()


def _plain(settings: Settings) -> Settings:
    """The settings without those of training."""
    kept = ("dim", "codebook_size", "codebook_dim", "cosine", "heads", "stages", "shared", "channel_axis", "not_finite")
    options = {name: getattr(settings, name) for name in kept}
    if settings.has_codebook:
        options |= {"codebook_update": "frozen", "init": "normal"}
    return Settings(estimator=_hard(settings.estimator), replace_every=0, **options)


def _digest(text: str, arrays: State) -> str:
    """Of settings and numbers, so that a file that was changed is noticed."""
    found = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode())
        found.update(arrays[name].tobytes())
    return found.hexdigest()


def _read_header(text: str) -> tuple[Settings, str, int | None]:
    header = json.loads(text)
    return file.from_text(json.dumps(header["settings"])), header["sha256"], header.get("position_bits")
