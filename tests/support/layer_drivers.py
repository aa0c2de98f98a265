"""The layers of all frameworks behind one face, over arrays of NumPy; and what works with which options."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from layer_cases import DIM, settings_of
from libraries import library_named

if TYPE_CHECKING:
    import diveq_core as dq

# Keras makes arrays of NumPy from tensors in a way that NumPy has deprecated.
KERAS_WARNS = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

KINDS = (
    *("plain", "both losses", "averages", "linear", "frozen", "cosine in heads", "projected", "stages, averages"),
    *("dropout", "curve", "Gumbel", "FSQ in stages", "channels first"),
)


class Driver:
    """A framework's layer; the ordinary kind, whose methods are those of `diveq_core.layers.Layer`."""

    library = ""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @classmethod
    def made(cls, settings: dq.layers.Settings) -> Driver:
        given = settings.given()
        return cls(cls.make(given.pop("dim"), given.pop("codebook_size"), **given))

    @classmethod
    def make(cls, *sizes: Any, **options: Any) -> Any:
        return cls.kind()(*sizes, **options)

    @classmethod
    def kind(cls) -> Any:
        raise NotImplementedError

    @classmethod
    def load(cls, path: Path) -> Driver:
        return cls(cls.kind().load(path))

    def save(self, path: Path) -> None:
        self.layer.save(path)

    def train(self, z: np.ndarray) -> float:
        """One step in training without an optimizer; the auxiliary loss."""
        out = self.layer(self.to(z))
        return float(self.back(out.loss))

    def evaluate(self, z: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def tokens(self, z: np.ndarray) -> Any:
        return self.layer.encode(self.to(z))

    def decoded(self, tokens: Any) -> np.ndarray:
        return self.back(self.layer.decode(tokens))

    def arrays(self) -> dict[str, np.ndarray]:
        return self.layer.arrays()

    def to(self, x: np.ndarray) -> Any:
        return library_named(self.library).to(x)

    def back(self, x: Any) -> np.ndarray:
        return library_named(self.library).back(x)


class NumPy(Driver):
    library = "numpy"

    @classmethod
    def kind(cls) -> Any:
        from diveq_numpy import VectorQuantizer

        return VectorQuantizer

    def train(self, z: np.ndarray) -> float:
        out = self.layer.forward(z)
        self.layer.backward(np.ones_like(z))
        self.layer.step(1e-3)
        self.layer.update()
        return float(out.loss)

    def evaluate(self, z: np.ndarray) -> np.ndarray:
        return self.layer.forward(z, train=False).z_q


class CuPy(NumPy):
    library = "cupy"

    @classmethod
    def kind(cls) -> Any:
        from diveq_cupy import VectorQuantizer

        return VectorQuantizer

    def train(self, z: np.ndarray) -> float:
        out = self.layer.forward(self.to(z))
        self.layer.backward(self.to(np.ones_like(z)))
        self.layer.step(1e-3)
        self.layer.update()
        return float(out.loss)

    def evaluate(self, z: np.ndarray) -> np.ndarray:
        return self.back(self.layer.forward(self.to(z), train=False).z_q)


class Torch(Driver):
    library = "torch"

    @classmethod
    def kind(cls) -> Any:
        from diveq_torch import VectorQuantizer

        return VectorQuantizer

    def train(self, z: np.ndarray) -> float:
        out = self.layer.train()(self.to(z).requires_grad_())
        (out.z_q.sum() + out.loss).backward()
        self.layer.update()
        return float(self.back(out.loss))

    def evaluate(self, z: np.ndarray) -> np.ndarray:
        return self.back(self.layer.eval()(self.to(z)).z_q)


class Flax(Driver):
    library = "jax"

    @classmethod
    def kind(cls) -> Any:
        return pytest.importorskip("diveq_jax.flax", exc_type=ImportError).VectorQuantizer

    @classmethod
    def make(cls, *sizes: Any, **options: Any) -> Any:
        from flax import nnx

        return cls.kind()(*sizes, **options, rngs=nnx.Rngs(0))

    def train(self, z: np.ndarray) -> float:
        self.layer.train()
        return super().train(z)

    def evaluate(self, z: np.ndarray) -> np.ndarray:
        self.layer.eval()
        return self.back(self.layer(self.to(z)).z_q)


class Equinox(Driver):
    library = "jax"

    def __init__(self, pair: Any) -> None:
        self.layer, self.state = pair

    @classmethod
    def kind(cls) -> Any:
        return pytest.importorskip("diveq_jax.equinox", exc_type=ImportError).VectorQuantizer

    @classmethod
    def make(cls, *sizes: Any, **options: Any) -> Any:
        kind = cls.kind()
        import equinox as eqx
        import jax

        return eqx.nn.make_with_state(kind)(*sizes, **options, key=jax.random.key(0))

    def train(self, z: np.ndarray) -> float:
        import jax

        out, self.state = self.layer(self.to(z), self.state, key=jax.random.key(1))
        self.layer, self.state = self.layer.update(self.state)
        return float(out.loss)

    def evaluate(self, z: np.ndarray) -> np.ndarray:
        return self.back(self.layer(self.to(z), self.state, inference=True)[0].z_q)

    def tokens(self, z: np.ndarray) -> Any:
        return self.layer.encode(self.to(z), self.state)

    def decoded(self, tokens: Any) -> np.ndarray:
        return self.back(self.layer.decode(tokens, self.state))

    def arrays(self) -> dict[str, np.ndarray]:
        return self.layer.arrays(self.state)

    def save(self, path: Path) -> None:
        self.layer.save(path, self.state)


class Keras(Driver):
    @classmethod
    def kind(cls) -> Any:
        pytest.importorskip("torch")
        # Keras fixes its backend when it is imported.
        os.environ.setdefault("KERAS_BACKEND", "torch")
        pytest.importorskip("keras")
        from diveq_keras import VectorQuantizer

        return VectorQuantizer

    def train(self, z: np.ndarray) -> float:
        out = self.layer(self.to(z), training=True, return_all=True)
        return float(self.back(out.loss))

    def evaluate(self, z: np.ndarray) -> np.ndarray:
        return self.back(self.layer(self.to(z), training=False))

    def to(self, x: np.ndarray) -> Any:
        from keras import ops

        return ops.convert_to_tensor(x)

    def back(self, x: Any) -> np.ndarray:
        from keras import ops

        return ops.convert_to_numpy(x)


class Mlx(Driver):
    library = "mlx"

    @classmethod
    def kind(cls) -> Any:
        pytest.importorskip("mlx.core", exc_type=ImportError)
        from diveq_mlx.nn import VectorQuantizer

        return VectorQuantizer

    def train(self, z: np.ndarray) -> float:
        self.layer.train()
        return super().train(z)

    def evaluate(self, z: np.ndarray) -> np.ndarray:
        self.layer.eval()
        return self.back(self.layer(self.to(z)).z_q)


DRIVERS: dict[str, type[Driver]] = {
    "numpy": NumPy,
    "cupy": CuPy,
    "torch": Torch,
    "flax": Flax,
    "equinox": Equinox,
    "keras": Keras,
    "mlx": Mlx,
}


def driver_named(name: str) -> type[Driver]:
    """A framework's layer by name, skipping the test where it is missing."""
    pytest.importorskip("safetensors")
    if DRIVERS[name].library:
        library_named(DRIVERS[name].library)
    DRIVERS[name].kind()
    return DRIVERS[name]


def vectors(kind: str, seed: int = 0) -> np.ndarray:
    """Vectors in the layout of a kind."""
    shape = (6, DIM, 5) if settings_of(kind).channel_axis == 1 else (6, 5, DIM)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def listed(x: Any) -> list[Any]:
    """Tokens as arrays, of which those of a curve are two."""
    return list(x) if isinstance(x, tuple) else [x]


def trained(name: str, kind: str) -> Driver:
    """A layer after two steps."""
    driver = driver_named(name).made(settings_of(kind))
    for seed in range(2):
        assert np.isfinite(driver.train(vectors(kind, seed)))
    for name, x in driver.arrays().items():
        assert np.isfinite(x).all(), name
    return driver


def layer_cell(name: str, kind: str) -> list[str]:
    """What was tried with a layer: steps in training, evaluation against its tokens, and its file in NumPy."""
    driver, z = trained(name, kind), vectors(kind, 9)
    found = ["train"]
    tokens = driver.tokens(z)
    before = driver.arrays()
    np.testing.assert_array_equal(driver.evaluate(z), driver.decoded(tokens))
    for key, x in driver.arrays().items():
        np.testing.assert_array_equal(x, before[key])
    found.append("evaluate")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "layer")
        driver.save(path)
        same_tokens(NumPy.load(path), tokens, driver, z)
    return [*found, "file"]


def same_tokens(reader: Driver, tokens: Any, writer: Driver, z: np.ndarray) -> None:
    """Check that a layer that read a file gives the tokens of the one that wrote it."""
    ours, theirs = listed(reader.tokens(z)), listed(tokens)
    np.testing.assert_array_equal(reader.back(ours[0]), writer.back(theirs[0]))
    for position, other in zip(ours[1:], theirs[1:], strict=True):
        # Of second order beside a corner: there two segments come as near as float32 can tell, which libraries round
        # otherwise, and of one of them it is the start.
        np.testing.assert_allclose(reader.back(position), writer.back(other), atol=1e-3)
