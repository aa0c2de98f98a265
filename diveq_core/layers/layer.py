"""What the layers of all frameworks share: codebook, tokens, arrays by name and files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

from diveq_core.arrays.registry import backend_of
from diveq_core.arrays.rows import describe
from diveq_core.layers import file, step
from diveq_core.layers.tokenizer import Tokenizer
from diveq_core.layers.words import State, words

if TYPE_CHECKING:
    from diveq_core.arrays.rows import Array
    from diveq_core.layers.results import Forward, Losses
    from diveq_core.layers.settings import Settings


class Quantization(NamedTuple):
    """What a layer gives."""

    z_q: Array
    """Quantized vectors, in the shape and dtype of ``z``."""

    indices: Any
    """Tokens, (...), with an axis for heads and one for stages at the end; on a curve, in evaluation, a `Point`."""

    loss: Array
    """The weighted sum of the auxiliary losses, (); 0 in evaluation."""

    losses: Losses
    """Its parts."""

    @classmethod
    def of(cls, out: Forward) -> Quantization:
        """What a layer gives of a step."""
        return cls(out.z_q, out.indices, out.losses.total, out.losses)


class Layer:
    """A quantizer with its state.

    A framework's layer derives from this; it holds ``settings``, gives its arrays in `held` and takes others in `hold`.
    """

    settings: Settings

    def held(self) -> State:
        """The arrays of the state, as the framework's own."""
        raise NotImplementedError

    def hold(self, state: State) -> None:
        """Take arrays in the place of those that are held, some or all of them."""
        raise NotImplementedError

    @classmethod
    def of_arrays(cls, arrays: dict[str, Any]) -> dict[str, Any]:
        """The framework's options for a layer that is to hold given arrays of NumPy as they are."""
        return {}

    def encode(self, z: Array, mask: Array | None = None) -> Any:
        """Tokens of vectors: hard, deterministic; `diveq_core.layers.encode`."""
        return step.encode(self.settings, self.held(), z, mask=mask)

    def decode(self, indices: Any, *, dtype: Any = None) -> Array:
        """Vectors from tokens: exactly the output in evaluation; `diveq_core.layers.decode`."""
        return step.decode(self.settings, self.held(), indices, dtype=dtype)

    def perplexity(self, indices: Any) -> Array:
        """Effective number of tokens in use, for each codebook; `diveq_core.layers.perplexity`."""
        return step.perplexity(self.settings, indices)

    @property
    def codebook(self) -> Any:
        """The codebook as it is searched, (K, D), with axes for heads and stages before; None for `FSQ`.

        Setting it sets the codewords, those of a linear codebook with W as the identity, and begins the averages anew.
        """
        state = self.held()
        if not self.settings.has_codebook:
            return None
        lib = backend_of("codebook", **state)
        return lib.copy(lib.stop_gradient(words(lib, self.settings, state)[0]))

    @codebook.setter
    def codebook(self, codebook: Array) -> None:
        self.hold(with_codebook(self.settings, self.held(), codebook))

    def arrays(self) -> dict[str, Any]:
        """The state as arrays of NumPy, under the same names in every framework."""
        state = self.held()
        if not state:
            return {}
        lib = backend_of("arrays", **state)
        return {name: lib.to_numpy(x).copy() for name, x in state.items()}

    def load_arrays(self, arrays: dict[str, Any]) -> None:
        """Take the arrays of another layer of the same settings, whatever its framework."""
        self.hold(taken(self.settings, self.held(), arrays))

    def tokenizer(self, *, position_bits: int | None = None) -> Tokenizer:
        """What encodes and decodes as this layer does in evaluation, as a value; `diveq_core.Tokenizer`."""
        return Tokenizer.of_state(self.settings, self.held(), position_bits=position_bits)

    def save(self, path: Any) -> None:
        """Write settings and arrays to one safetensors file, which the layer of every framework reads."""
        file.write(path, self.settings, self.arrays())

    @classmethod
    def load(cls, path: Any, **options: Any) -> Self:
        """The layer that a file holds, of whatever framework it came.

        Parameters
        ----------
        path
            Of a file that ``save`` wrote.
        **options
            Those of the framework, device and dtype say, and what is to differ from the file: ``channel_axis=1`` in a
            framework whose images have their channels first.
        """
        settings, arrays = file.read(path)
        given = settings.given() | cls.of_arrays(arrays) | options
        layer: Any = cls(given.pop("dim"), given.pop("codebook_size"), **given)  # type: ignore[call-arg]
        layer.load_arrays(arrays)
        return layer


def with_codebook(settings: Settings, state: State, codebook: Array) -> State:
    """The arrays of a state that a given codebook changes."""
    if not settings.has_codebook:
        raise ValueError("codebook: there is none to be set, FSQ has no codebook")
    name = settings.table
    lib = backend_of("codebook", codebook=codebook, **{name: state[name]})
    if tuple(codebook.shape) != settings.codebook_shape:
        raise ValueError(f"codebook: expected shape {settings.codebook_shape}, got {tuple(codebook.shape)}")
    if lib.is_concrete(codebook) and not lib.all_finite(codebook):
        raise ValueError("codebook: must be finite, got NaN or infinity")
    codebook = lib.astype(lib.copy(lib.stop_gradient(codebook)), state[name].dtype)
    xp, new = lib.xp, {name: codebook}
    if "weight" in state:
        identity = xp.eye(codebook.shape[-1], dtype=codebook.dtype, **lib.place(codebook))
        new["weight"] = lib.copy(xp.broadcast_to(identity, tuple(state["weight"].shape)))
    if "averages" in state:
        new |= {"averages": lib.copy(codebook), "counts": xp.zeros_like(state["counts"])}
    if "started" in state:
        new["started"] = xp.ones_like(state["started"])
    return new


def taken(settings: Settings, state: State, arrays: dict[str, Any]) -> State:
    """Arrays of NumPy as those of a state, in its library, dtypes and device."""
    if not isinstance(arrays, dict) or set(arrays) != set(settings.shapes):
        got = ", ".join(sorted(arrays)) if isinstance(arrays, dict) else describe(arrays)
        raise ValueError(f"load_arrays: expected {', '.join(settings.shapes) or 'no array'}, got {got or 'none'}")
    new = {}
    for name, shape in settings.shapes.items():
        if tuple(arrays[name].shape) != shape:
            raise ValueError(f"load_arrays: {name} must have shape {shape}, got {tuple(arrays[name].shape)}")
        lib = backend_of("load_arrays", **{name: state[name]})
        # A copy: what was given may be written to later.
        new[name] = lib.copy(lib.like(arrays[name], state[name]))
    return new
