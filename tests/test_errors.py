"""Bad input gives one clear error in every library: the function, what it expected and what it got."""

from __future__ import annotations

import re

import numpy as np
import pytest

import diveq_core as dq
from diveq_core import layers
from libraries import Library, library_named

K, D = 4, 3
Z = np.linspace(-1.0, 1.0, 5 * D, dtype=np.float32).reshape(5, D)
CODEBOOK = np.linspace(-2.0, 2.0, K * D, dtype=np.float32).reshape(K, D)


def nearest(z, codebook, **options):
    return dq.nearest(z, codebook, **options)


def quantize(z, codebook, **options):
    return dq.quantize(z, codebook, dq.DiVeQDetach(), **options)


def vjp(z, codebook, **options):
    return dq.vjp(z, codebook, dq.DiVeQDetach(), **options)


def jvp(z, codebook, **options):
    return dq.jvp(z, codebook, z, codebook, dq.DiVeQDetach(), **options)


VERBS = [nearest, quantize, vjp, jvp]


def assert_says(error: pytest.ExceptionInfo, function: str, expected: str, got: str) -> None:
    """All three parts of the message, in this order."""
    pattern = rf"(?s)^{re.escape(function)}: .*{re.escape(expected)}.*, got .*{re.escape(got)}"
    assert re.search(pattern, str(error.value)), f"{error.value}\nlacks: {function}: ... {expected} ..., got {got}"


# Libraries, dtypes and shapes of z and the codebook


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["z", "codebook"])
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_not_real_floating(library: Library, verb, name: str, dtype: str):
    arguments = {"z": Z, "codebook": CODEBOOK}
    arguments[name] = arguments[name].astype(dtype)
    with pytest.raises(TypeError) as error:
        verb(*(library.to(x) for x in arguments.values()))
    assert_says(error, verb.__name__, f"{name} must have a real floating dtype", dtype)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_eight_bits_are_no_named_dtype(name: str):
    library = library_named(name)
    if name == "torch":
        import torch

        kind = torch.float8_e4m3fn
    else:
        import jax

        kind = jax.numpy.float8_e4m3fn
    eight = library.cast(library.to(Z), kind)
    for verb in VERBS:
        with pytest.raises(TypeError) as error:
            verb(eight, library.to(CODEBOOK))
        assert_says(error, verb.__name__, "z must have a real floating dtype", "float8_e4m3fn")
    with pytest.raises(TypeError) as error:
        dq.decode(library.to(np.array([0])), library.to(CODEBOOK), dq.STE(), dtype=kind)
    assert_says(error, "decode", "dtype must have a real floating dtype", "float8_e4m3fn")


NO_DTYPES = ["foo", "complex64", "int32", 3, object(), np.ones(3)]


@pytest.mark.parametrize("dtype", NO_DTYPES, ids=lambda x: type(x).__name__)
def test_dtype_of_decoded_vectors(library: Library, dtype: object):
    indices, codebook = library.to(np.array([0, 1])), library.to(CODEBOOK)
    of_layer = layers.Settings(D, K, dq.STE())
    state = layers.init(of_layer, codebook, noise=library.to(np.ones(layers.noise_size(of_layer), np.float32)))
    for decode in (
        lambda: dq.decode(indices, codebook, dq.STE(), dtype=dtype),
        lambda: layers.decode(of_layer, state, indices, dtype=dtype),
    ):
        with pytest.raises(TypeError, match=r"^decode: dtype must (be|have) a real floating dtype .*, got "):
            decode()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("shape", [(5, 2), (5, 4), (3, 5), (1,), ()], ids=str)
def test_z_of_the_wrong_shape(library: Library, verb, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=verb.__name__) as error:
        verb(library.to(np.zeros(shape, np.float32)), library.to(CODEBOOK))
    assert_says(error, verb.__name__, "z must have shape (..., D) with D = 3 as in the codebook (4, 3)", str(shape))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("shape", [(0, D), (K, 0), (0, 0), (D,), (2, K, D), ()], ids=str)
def test_codebook_of_the_wrong_shape(library: Library, verb, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=verb.__name__) as error:
        verb(library.to(Z), library.to(np.zeros(shape, np.float32)))
    assert_says(error, verb.__name__, "codebook must have shape (K, D) with K >= 1 and D >= 1", str(shape))


@pytest.mark.parametrize("verb", VERBS)
def test_mixed_libraries(library: Library, verb):
    other = np.asarray if library.name != "numpy" else library_named("array_api_strict").to
    with pytest.raises(TypeError) as error:
        verb(library.to(Z), other(CODEBOOK))
    assert_says(error, verb.__name__, "expected all arrays of one library", "z of ")
    assert library.name in str(error.value)
    assert "codebook of " in str(error.value)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("wrong", [None, 1.0, [[1.0, 2.0, 3.0]], "codebook"], ids=repr)
def test_no_array(library: Library, verb, wrong):
    with pytest.raises(TypeError) as error:
        verb(library.to(Z), wrong)
    assert_says(error, verb.__name__, "codebook must be an array", f"builtins.{type(wrong).__name__}")


# NaN and infinity


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["z", "codebook"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_when_asked(library: Library, verb, name: str, bad: float):
    arguments = {"z": Z.copy(), "codebook": CODEBOOK.copy()}
    arguments[name][2, 1] = bad
    arguments = [library.to(x) for x in arguments.values()]
    options = [{"check_finite": True}, {}] if library.name == "numpy" else [{"check_finite": True}]
    for option in options:
        with pytest.raises(ValueError, match=verb.__name__) as error:
            verb(*arguments, **option)
        assert_says(error, verb.__name__, f"{name} must be finite", f"NaN or infinity in {name}")


@pytest.mark.parametrize("name", ["z", "codebook"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@np.errstate(invalid="ignore")  # NumPy says so besides
def test_values_that_are_not_finite_show_when_not_refused(library: Library, name: str, bad: float):
    arguments = {"z": Z.copy(), "codebook": CODEBOOK.copy()}
    arguments[name][2, 1] = bad
    z, codebook = (library.to(x) for x in arguments.values())
    options = {"check_finite": False} if library.name == "numpy" else {}
    rows = [2] if name == "z" else range(len(Z))
    indices = library.back(dq.nearest(z, codebook, **options))
    assert (indices[rows] == -1).all()
    assert (np.delete(indices, rows) >= 0).all()
    noise = library.to(np.ones_like(Z))
    for estimator in (dq.STE(), dq.NSVQ(), dq.DiVeQ(), dq.DiVeQDetach(), dq.Radial(dq.PseudoHuber())):
        out = dq.quantize(z, codebook, estimator, noise=noise, **options)
        z_q = library.back(out.z_q)
        assert np.isnan(z_q[rows]).all()
        assert np.isfinite(np.delete(z_q, rows, axis=0)).all()


def test_large_finite_values_are_not_refused(library: Library):
    # Their sum overflows, which is no sign of infinity.
    z = np.full((40, D), 1e37, np.float32)
    indices = dq.nearest(library.to(z), library.to(z[:2] * np.float32([[1], [-1]])), check_finite=True)
    assert library.back(indices).tolist() == [0] * 40


# Estimators and their options


@pytest.mark.parametrize("verb", [dq.quantize, dq.vjp])
@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (dq.DiVeQ, "the type DiVeQ; call it: an instance is expected"),
        ("DiVeQ", "builtins.str"),
        (None, "builtins.NoneType"),
        (dq.Power(1.0), "diveq_core.estimators.radii.Power"),
    ],
    ids=["class", "name", "none", "radius"],
)
def test_no_estimator(library: Library, verb, wrong, got: str):
    with pytest.raises(TypeError) as error:
        verb(library.to(Z), library.to(CODEBOOK), wrong)
    assert_says(error, verb.__name__, "estimator must be an Estimator such as DiVeQ()", got)


OPTIONS = [
    (dq.DiVeQ, "sigma", "and >= 0"),
    (dq.PseudoHuber, "delta", "and > 0"),
    (dq.PNorm, "p", "and >= 1"),
    (dq.Power, "alpha", ""),
]


@pytest.mark.parametrize(("kind", "name", "bound"), OPTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_options_that_are_not_finite(kind, name: str, bound: str, value: float):
    with pytest.raises(ValueError, match=name) as error:
        kind(value)
    assert_says(error, kind.__name__, f"{name} must be finite {bound}".strip(), str(value))


@pytest.mark.parametrize(
    ("kind", "name", "bound", "value"),
    [(*OPTIONS[0], -1e-9), (*OPTIONS[1], 0.0), (*OPTIONS[1], -1.0), (*OPTIONS[2], 0.999)],
)
def test_options_out_of_range(kind, name: str, bound: str, value: float):
    with pytest.raises(ValueError, match=name) as error:
        kind(value)
    assert_says(error, kind.__name__, f"{name} must be finite {bound}", str(value))


@pytest.mark.parametrize(("kind", "name", "bound"), OPTIONS)
@pytest.mark.parametrize("value", ["0.1", None, 1j, True, [0.1], np.ones(2)], ids=repr)
def test_options_that_are_no_real_number(kind, name: str, bound: str, value):
    with pytest.raises(TypeError) as error:
        kind(value)
    what = f"{type(value).__module__}.{type(value).__name__}"
    assert_says(error, kind.__name__, f"{name} must be a real number {bound.removeprefix('and ')}".strip(), what)


@pytest.mark.parametrize("value", [0, 1, np.float32(0.5), np.float64(0.5), np.int64(1)], ids=repr)
def test_options_may_be_any_real_number(value):
    assert dq.DiVeQ(value).sigma == float(value)
    assert type(dq.DiVeQ(value).sigma) is float


@pytest.mark.parametrize(
    ("matrix", "kind", "expected", "got"),
    [
        (np.ones((2, 3)), ValueError, "matrix must have shape (D, D)", "(2, 3)"),
        (np.ones(3), ValueError, "matrix must have shape (D, D)", "(3,)"),
        (np.ones((0, 0)), ValueError, "matrix must have shape (D, D)", "(0, 0)"),
        (np.eye(3, dtype=int), TypeError, "matrix must have a real floating dtype", "int64"),
        (np.diag([1.0, np.nan, 1.0]), ValueError, "matrix must be finite", "NaN or infinity"),
        (np.diag([1.0, 0.0, 2.0]), ValueError, "matrix must be positive definite", "smallest eigenvalue 0"),
        (np.diag([1.0, -3.0, 2.0]), ValueError, "matrix must be positive definite", "smallest eigenvalue -3"),
        ([[1.0]], TypeError, "matrix must be an array", "builtins.list"),
    ],
)
def test_mahalanobis(matrix, kind, expected: str, got: str):
    with pytest.raises(kind) as error:
        dq.Mahalanobis(matrix)
    assert_says(error, "Mahalanobis", expected, got)


def test_mahalanobis_of_another_width(library: Library):
    estimator = dq.Radial(dq.Mahalanobis(np.eye(D + 1)))
    with pytest.raises(ValueError, match="Mahalanobis") as error:
        dq.vjp(library.to(Z), library.to(CODEBOOK), estimator)[1](library.to(Z))
    assert_says(error, "Mahalanobis", "matrix must have shape (D, D) with D = 3 as in z", "(4, 4)")


@pytest.mark.parametrize("wrong", [dq.Power, 1.0, "rho", None], ids=repr)
def test_no_radius(wrong):
    with pytest.raises(TypeError) as error:
        dq.Radial(wrong)
    assert_says(error, "Radial", "radius must be a radius such as Power(1.0), or a callable r(q, z)", repr(wrong))


@pytest.mark.parametrize("arguments", [(1.0,), (None,), (lambda q, z: q, 2.0)])
def test_custom_radius_of_what_cannot_be_called(arguments):
    with pytest.raises(TypeError) as error:
        dq.CustomRadius(*arguments)
    assert_says(error, "CustomRadius", "must be callable with (q, z)", "builtins.")


def test_custom_radius_of_the_wrong_shape(library: Library):
    if not library.differentiates:
        pytest.skip(f"{library.name} does not evaluate a radius without its gradients")
    estimator = dq.Radial(lambda q, z: q - z)
    with pytest.raises(ValueError, match="CustomRadius") as error:
        dq.vjp(library.to(Z), library.to(CODEBOOK), estimator)[1](library.to(Z))
    assert_says(error, "CustomRadius", "r(q, z) must have shape (N,) or (N, 1) with N = 5", "(5, 3)")


def test_custom_gradients_of_the_wrong_shape(library: Library):
    radius = dq.CustomRadius(lambda q, z: abs((q - z)[:, 0]), lambda q, z: (q, z[:, 0]))
    with pytest.raises(ValueError, match="CustomRadius") as error:
        dq.vjp(library.to(Z), library.to(CODEBOOK), dq.Radial(radius))[1](library.to(Z))
    assert_says(error, "CustomRadius", "must give the gradient to z in the shape of z, (5, 3)", "(5,)")


def test_a_radius_by_value_needs_differentiation(library: Library):
    if library.differentiates:
        pytest.skip(f"{library.name} differentiates")
    estimator = dq.Radial(lambda q, z: abs((q - z)[:, 0]))
    with pytest.raises(TypeError) as error:
        dq.vjp(library.to(Z), library.to(CODEBOOK), estimator)[1](library.to(Z))
    assert_says(error, "Radial", "log_r_gradients(q, z)", "r alone")
    assert "no automatic differentiation" in str(error.value)


def test_an_estimator_without_its_rules_cannot_be_made():
    class Empty(dq.Estimator):
        pass

    class Backwards(dq.Estimator):
        def vjp(self, lib, z, q, noise, g):
            return g, None

    with pytest.raises(TypeError, match=r"Empty with abstract methods jvp, vjp"):
        Empty()
    with pytest.raises(TypeError, match=r"Backwards with abstract method jvp"):
        Backwards()


# Noise and generators


@pytest.mark.parametrize("verb", [dq.quantize, dq.vjp])
@pytest.mark.parametrize("shape", [(5, 2), (5,), (1, D), (6, D), ()], ids=str)
def test_noise_of_the_wrong_shape(library: Library, verb, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="noise") as error:
        verb(library.to(Z), library.to(CODEBOOK), dq.DiVeQ(), noise=library.to(np.ones(shape, np.float32)))
    assert_says(error, verb.__name__, "noise must have the shape of z, (5, 3)", str(shape))


@pytest.mark.parametrize("verb", [dq.quantize, dq.vjp])
def test_noise_that_is_not_floating(library: Library, verb):
    with pytest.raises(TypeError) as error:
        verb(library.to(Z), library.to(CODEBOOK), dq.DiVeQ(), noise=library.to(np.ones((5, D), np.int32)))
    assert_says(error, verb.__name__, "noise must have a real floating dtype", "int32")


def test_noise_of_another_library(library: Library):
    other = np.asarray if library.name != "numpy" else library_named("array_api_strict").to
    with pytest.raises(TypeError) as error:
        dq.quantize(library.to(Z), library.to(CODEBOOK), dq.DiVeQ(), noise=other(Z))
    assert_says(error, "quantize", "expected all arrays of one library", "noise of ")


GENERATORS = {
    "numpy": "rng must be a numpy.random.Generator",
    "torch": "rng must be a torch.Generator",
    "jax": "rng must be a JAX key",
    "cupy": "rng must be a cupy.random.Generator",
    "array_api_strict": "as rng= an object with a method standard_normal(shape)",
    "mlx": "rng must be an MLX key",
}


@pytest.mark.parametrize("wrong", [0, "seed", object()], ids=["integer", "text", "object"])
def test_generator_of_the_wrong_kind(library: Library, wrong):
    with pytest.raises(TypeError) as error:
        dq.quantize(library.to(Z), library.to(CODEBOOK), dq.DiVeQ(), rng=wrong)
    assert_says(error, "quantize", GENERATORS[library.name], type(wrong).__name__)


@pytest.mark.parametrize("wrong", [np.zeros(2, np.float32), np.zeros((3, 2), np.uint32)], ids=["floating", "several"])
def test_jax_key_of_the_wrong_kind(wrong):
    library = library_named("jax")
    with pytest.raises(TypeError) as error:
        dq.quantize(library.to(Z), library.to(CODEBOOK), dq.DiVeQ(), rng=library.to(wrong))
    assert_says(error, "quantize", "rng must be a JAX key", f"{wrong.dtype} of shape {wrong.shape}")


@pytest.mark.parametrize(
    ("estimator", "words"),
    [
        (dq.Residual(dq.NSVQ(), 2), CODEBOOK),
        (dq.Product(dq.STE(), 3), CODEBOOK[:, :1]),
        (dq.SFDiVeQ(), CODEBOOK),
    ],
    ids=repr,
)
@pytest.mark.parametrize("verb", [dq.quantize, dq.vjp])
def test_a_key_that_is_split_is_checked_first(verb, estimator, words: np.ndarray):
    library = library_named("jax")
    for wrong in (np.random.default_rng(0), 0, library.to(np.zeros(2, np.float32))):
        with pytest.raises(TypeError) as error:
            verb(library.to(Z), library.to(words), estimator, rng=wrong)
        assert_says(error, verb.__name__, "rng must be a JAX key for JAX arrays", "")


def test_several_jax_keys():
    library = library_named("jax")
    import jax

    with pytest.raises(TypeError) as error:
        dq.quantize(library.to(Z), library.to(CODEBOOK), dq.DiVeQ(), rng=jax.random.split(jax.random.key(0), 3))
    assert_says(error, "quantize", "rng must be a JAX key", "key<fry> of shape (3,)")


@pytest.mark.parametrize("verb", [dq.quantize, dq.vjp])
@pytest.mark.parametrize("name", ["jax", "array_api_strict"])
def test_no_default_stream(name: str, verb):
    library = library_named(name)
    with pytest.raises(TypeError) as error:
        verb(library.to(Z), library.to(CODEBOOK), dq.NSVQ())
    got = "neither" if name == "jax" else "builtins.NoneType"
    assert_says(error, verb.__name__, "of shape (5, 3)", got)
    assert "noise=" in str(error.value)
    assert "rng=" in str(error.value)


# Indices, cotangents and tangents


@pytest.mark.parametrize("verb", [quantize, vjp, jvp])
def test_indices(library: Library, verb):
    z, codebook = library.to(Z), library.to(CODEBOOK)
    with pytest.raises(TypeError) as error:
        verb(z, codebook, indices=library.to(np.zeros(5, np.float32)))
    assert_says(error, verb.__name__, "indices must have an integer dtype", "float32")
    with pytest.raises(TypeError) as error:
        verb(z, codebook, indices=library.to(np.zeros(5, bool)))
    assert_says(error, verb.__name__, "indices must have an integer dtype", "bool")
    with pytest.raises(ValueError, match="indices") as error:
        verb(z, codebook, indices=library.to(np.zeros((5, 1), int)))
    assert_says(error, verb.__name__, "indices must have the shape of z without its last axis, (5,)", "(5, 1)")
    with pytest.raises(TypeError) as error:
        verb(z, codebook, indices=[0] * 5)
    assert_says(error, verb.__name__, "indices must be an array", "builtins.list")


def test_lookup(library: Library):
    codebook = library.to(CODEBOOK)
    with pytest.raises(TypeError) as error:
        dq.lookup(library.to(Z), codebook)
    assert_says(error, "lookup", "indices must have an integer dtype", "float32")
    indices = library.to(np.zeros(2, int))
    with pytest.raises(TypeError) as error:
        dq.lookup(indices, indices)
    assert_says(error, "lookup", "codebook must have a real floating dtype", "int")
    with pytest.raises(ValueError, match="lookup") as error:
        dq.lookup(indices, library.to(Z[0]))
    assert_says(error, "lookup", "codebook must have shape (K, D) with K >= 1 and D >= 1", "(3,)")
    with pytest.raises(TypeError) as error:
        dq.lookup(0, codebook)
    assert_says(error, "lookup", "indices must be an array", "builtins.int")


@pytest.mark.parametrize("values", [[0, 4], [-2, 3], [-5, 9]])
@pytest.mark.parametrize("function", ["lookup", "decode", "quantize"])
def test_numpy_refuses_indices_out_of_range(values: list[int], function: str):
    indices = np.array(values)

    def verb(indices):
        if function == "lookup":
            return dq.lookup(indices, CODEBOOK)
        if function == "decode":
            return dq.decode(indices, CODEBOOK, dq.DiVeQ())
        return dq.quantize(Z[:2], CODEBOOK, dq.STE(), indices=indices)

    with pytest.raises(ValueError, match="indices") as error:
        verb(indices)
    expected = "indices must lie in [0, K) with K = 4, or be -1 for a vector that is not finite"
    assert_says(error, function, expected, f"values from {values[0]} to {values[1]}")


def test_cotangent(library: Library):
    _, pullback = dq.vjp(library.to(Z), library.to(CODEBOOK), dq.DiVeQDetach())
    for shape in [(5,), (3, 5), (5, 1), (1, D), ()]:
        with pytest.raises(ValueError, match="pullback") as error:
            pullback(library.to(np.ones(shape, np.float32)))
        assert_says(error, "pullback", "g must have the shape of z_q, (5, 3)", str(shape))
    with pytest.raises(TypeError) as error:
        pullback(library.to(np.ones((5, D), np.int32)))
    assert_says(error, "pullback", "g must have a real floating dtype", "int32")
    with pytest.raises(TypeError) as error:
        pullback(1.0)
    assert_says(error, "pullback", "g must be an array", "builtins.float")
    other = np.asarray if library.name != "numpy" else library_named("array_api_strict").to
    with pytest.raises(TypeError) as error:
        pullback(other(Z))
    assert_says(error, "pullback", "expected all arrays of one library", "g of ")


@pytest.mark.parametrize("name", ["dz", "dcodebook"])
def test_tangents(library: Library, name: str):
    z, codebook = library.to(Z), library.to(CODEBOOK)
    good = {"dz": z, "dcodebook": codebook}
    model = {"dz": "z, (5, 3)", "dcodebook": "codebook, (4, 3)"}[name]
    cases = [
        (ValueError, library.to(np.ones((2, D), np.float32)), f"{name} must have the shape of {model}", "(2, 3)"),
        (TypeError, library.to(np.ones((5, D), np.int32)), f"{name} must have a real floating dtype", "int32"),
        (TypeError, None, f"{name} must be an array", "builtins.NoneType"),
    ]
    for kind, wrong, expected, got in cases:
        with pytest.raises(kind) as error:
            dq.jvp(z, codebook, *(good | {name: wrong}).values(), dq.DiVeQDetach())
        assert_says(error, "jvp", expected, got)


@pytest.mark.parametrize("wrong", ["no", 1, np.ones(3)], ids=repr)
def test_a_check_that_is_neither_wanted_nor_not(wrong):
    verbs = (dq.nearest, dq.nearest_cosine, dq.project, lambda z, e, **o: dq.quantize(z, e, dq.STE(), **o))
    for verb in verbs:
        with pytest.raises(TypeError, match=r"^\w+: check_finite must be True, False or None, got "):
            verb(Z, CODEBOOK, check_finite=wrong)
