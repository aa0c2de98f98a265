"""Finite scalar quantization: the grid, the indices, and derivatives against plain automatic differentiation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import diveq_core as dq
from libraries import Library, assert_close, library_named
from strategies import EPS, assert_within, dtypes_of, example_count, precision, round_to, to_library

torch = pytest.importorskip("torch", reason="torch's automatic differentiation is the reference")

# Few, because JAX compiles for each.
LEVELS = ((8, 5, 5, 5), (3,), (4, 256, 7))


def constants(levels: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Half width, offset, shift and floor(L / 2)."""
    counts = np.array(levels, float)
    half, offset = (counts - 1) * (1 - 1e-3) / 2, np.where(counts % 2 == 0, 0.5, 0.0)
    return half, offset, np.arctanh(offset / half), counts // 2


def plain(xp: Any, sg: Any, z: Any, levels: tuple[int, ...]) -> Any:
    """``(b + sg[round b - b]) / floor(L / 2)``."""
    half, offset, shift, width = (xp.asarray(x) for x in constants(levels))
    b = xp.tanh(z + shift) * half - offset
    return (b + sg(xp.round(b) - b)) / width


def from_ties(z: np.ndarray, levels: tuple[int, ...]) -> np.ndarray:
    """Distance of b(z) from the nearest boundary between levels."""
    half, offset, shift, _ = constants(levels)
    b = np.tanh(z + shift) * half - offset
    return np.abs(b - np.floor(b) - 0.5)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """Levels, vectors and a cotangent."""
    levels = draw(st.sampled_from(LEVELS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (2, 5, len(levels))
    z = rng.standard_normal(shape) * draw(st.sampled_from([0.1, 1.0, 5.0]))
    return levels, z, rng.standard_normal(shape)


@settings(max_examples=example_count(0.5))
@given(data=st.data())
def test_verbs_are_plain_automatic_differentiation(library: Library, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(dtypes_of(library)))
    levels, z, g = data.draw(inputs())
    z, g = round_to(z, dtype), round_to(g, dtype)
    leaf = torch.tensor(z).requires_grad_()
    want = plain(torch, torch.detach, leaf, levels)
    (g_z,) = torch.autograd.grad(want, leaf, torch.tensor(g))
    half, _, _, width = constants(levels)
    # tanh within 4 ulp, 1 - tanh and 1 + tanh of numbers of order one, and three products; g_z is symmetric.
    size = 2 * half / width * np.abs(g)
    with precision(library, dtype):
        ours = [to_library(library, x, dtype) for x in (z, g)]
        out, pullback = dq.vjp(ours[0], None, dq.FSQ(levels))
        same, tangent = dq.jvp(ours[0], None, ours[1], None, dq.FSQ(levels))
        again = dq.quantize(ours[0], None, dq.FSQ(levels))
        assert_within(pullback(ours[1])[0], g_z.numpy(), size, dtype, library, 16)
        assert_within(tangent, g_z.numpy(), size, dtype, library, 16)
        # Within rounding of a boundary either level is right.
        clear = from_ties(z, levels) > 64 * max(levels) * EPS["float64" if dtype == "float64" else "float32"]
        error = np.abs(library.back(out.z_q).astype(np.float64) - want.detach().numpy())
        assert np.all(error[clear] <= 2 * EPS[dtype])
        for other in (same, again):
            np.testing.assert_array_equal(library.back(other.z_q), library.back(out.z_q))
            np.testing.assert_array_equal(library.back(other.indices), library.back(out.indices))
        decoded = dq.decode(out.indices, None, dq.FSQ(levels), dtype=ours[0].dtype)
        assert decoded.dtype == out.z_q.dtype
        np.testing.assert_array_equal(library.back(decoded), library.back(out.z_q))


@pytest.mark.parametrize("name", ["torch", "jax"])
@settings(max_examples=example_count(0.2))
@given(problem=inputs())
def test_differentiates_to_the_pullback_in_both_orders(name: str, problem: tuple) -> None:
    levels, z, g = problem
    library = library_named(name)
    with precision(library, "float64"):
        z, g = library.to(z), library.to(g)
        results = []
        if name == "torch":
            for function in (
                lambda z: dq.quantize(z, None, dq.FSQ(levels)).z_q,
                lambda z: plain(torch, torch.detach, z, levels),
            ):
                leaf = z.clone().requires_grad_()
                (first,) = torch.autograd.grad(function(leaf), leaf, g, create_graph=True)
                results.append((first, *torch.autograd.grad((first * first).sum(), leaf)))
        else:
            import jax

            for function in (
                lambda z: dq.quantize(z, None, dq.FSQ(levels)).z_q,
                lambda z: plain(jax.numpy, jax.lax.stop_gradient, z, levels),
            ):
                pulled = lambda z, f=function: jax.vjp(f, z)[1](g)[0]  # noqa: E731
                results.append((pulled(z), jax.grad(lambda z, f=pulled: (f(z) ** 2).sum())(z)))
        for got, want in zip(*results, strict=True):
            # Numbers of order one, ten operations.
            np.testing.assert_allclose(library.back(got), library.back(want), rtol=1e-12, atol=1e-13)


def test_every_index_decodes_and_encodes_to_itself(library: Library) -> None:
    levels = (4, 3, 5)
    indices = np.arange(math.prod(levels))
    half, offset, shift, width = constants(levels)
    decoded = dq.decode(library.to(indices), None, dq.FSQ(levels))
    z_q = library.back(decoded)
    assert z_q.dtype == np.float32
    digits = np.stack([indices % 4, indices // 4 % 3, indices // 12], axis=-1)
    np.testing.assert_array_equal(z_q, ((digits - width) / width).astype(np.float32))
    assert len(np.unique(z_q, axis=0)) == len(indices)
    # The outermost levels lie a little beyond the bound.
    z = np.arctanh(np.clip((z_q * width + offset) / half, -1 + 1e-6, 1 - 1e-6)) - shift
    out = dq.quantize(library.to(z.astype(np.float32)), None, dq.FSQ(levels))
    np.testing.assert_array_equal(library.back(out.indices), indices)
    np.testing.assert_array_equal(library.back(out.z_q), z_q)


@pytest.mark.parametrize("level", range(3, 12))
def test_the_grid_is_centred_and_all_of_it_is_reached(level: int) -> None:
    """b(0) = 0: by artanh, where the tan of the paper's pseudocode is off."""
    half, offset, _, _ = constants((level,))
    out, pullback = dq.vjp(np.zeros((1, 1)), None, dq.FSQ([level]))
    assert out.z_q[0, 0] == 0
    slope = (half - offset**2 / half) / (level // 2)
    np.testing.assert_allclose(pullback(np.ones((1, 1)))[0][0], slope, rtol=1e-14)
    if level % 2 == 0:
        assert abs(np.tanh(np.tan(offset / half)) * half - offset)[0] > 1e-6
    reached = dq.quantize(np.linspace(-20, 20, 4001)[:, None], None, dq.FSQ([level]))
    np.testing.assert_array_equal(np.unique(reached.indices), np.arange(level))
    assert reached.z_q.min() == -1
    assert np.all(np.diff(reached.indices) >= 0)


def test_extremes_and_rows_that_are_not_finite(library: Library) -> None:
    z = np.array([[3e38, -3e38], [np.nan, 0], [np.inf, 0], [1e-38, -1e-38]], np.float32)
    out, pullback = dq.vjp(library.to(z), None, dq.FSQ([5, 4]), check_finite=False)
    z_q, indices = library.back(out.z_q), library.back(out.indices)
    np.testing.assert_array_equal(indices, [4, -1, -1, 12])
    np.testing.assert_array_equal(z_q[[0, 3]], [[1, -1], [0, 0]])
    assert np.all(np.isnan(z_q[1:3]))
    g_z = library.back(pullback(library.to(np.ones_like(z)))[0])
    np.testing.assert_array_equal(g_z[0], 0)
    decoded = dq.decode(out.indices, None, dq.FSQ([5, 4]))
    np.testing.assert_array_equal(library.back(decoded), z_q)


def test_no_rows(library: Library) -> None:
    out, pullback = dq.vjp(library.to(np.zeros((0, 2), np.float32)), None, dq.FSQ([3, 4]))
    assert_close(out.z_q, np.zeros((0, 2), np.float32), library)
    assert_close(pullback(out.z_q)[0], np.zeros((0, 2), np.float32), library)
    assert tuple(dq.decode(out.indices, None, dq.FSQ([3, 4])).shape) == (0, 2)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torch_transformations() -> None:
    z = torch.tensor(np.random.default_rng(0).standard_normal((4, 3, 2)))
    dz = torch.ones_like(z)
    want, tangent = dq.jvp(z, None, dz, None, dq.FSQ([8, 5]))

    def quantize(z: Any) -> Any:
        return dq.quantize(z, None, dq.FSQ([8, 5])).z_q

    torch.testing.assert_close(torch.func.vmap(quantize)(z), want.z_q, rtol=0, atol=0)
    batched = torch.func.vmap(torch.func.grad(lambda z: quantize(z).sum()))(z)
    torch.testing.assert_close(batched, tangent, rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.func.jvp(quantize, (z,), (dz,))[1], tangent, rtol=1e-14, atol=0)
    compiled = torch.compile(quantize, fullgraph=True, backend="aot_eager")
    leaf = z.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf).sum(), leaf)[0], tangent, rtol=1e-14, atol=0)


def test_jax_transformations() -> None:
    jax = pytest.importorskip("jax")
    z = jax.numpy.asarray(np.random.default_rng(0).standard_normal((4, 3, 2)), "float32")
    want, tangent = dq.jvp(z, None, jax.numpy.ones_like(z), None, dq.FSQ([8, 5]))

    def quantize(z: Any) -> Any:
        return dq.quantize(z, None, dq.FSQ([8, 5])).z_q

    np.testing.assert_array_equal(jax.jit(jax.vmap(quantize))(z), want.z_q)
    batched = jax.jit(jax.vmap(jax.grad(lambda z: quantize(z).sum())))(z)
    # Another order of the same few operations.
    np.testing.assert_allclose(batched, tangent, rtol=1e-5, atol=1e-7)
    pushed = jax.jvp(quantize, (z,), (jax.numpy.ones_like(z),))[1]
    np.testing.assert_allclose(pushed, tangent, rtol=1e-5, atol=1e-7)


def test_agrees_with_vector_quantize_pytorch() -> None:
    """At odd levels, where the peer's margin of the other sign moves boundaries by 0.2 percent only."""
    peer = pytest.importorskip("vector_quantize_pytorch")
    levels = [5, 7]
    z = np.random.default_rng(0).standard_normal((200, 2)).astype(np.float32)
    z = z[np.all(from_ties(z, tuple(levels)) > 0.02, axis=-1)]
    theirs, indices = peer.FSQ(levels)(torch.tensor(z)[None])
    out = dq.quantize(torch.tensor(z), None, dq.FSQ(levels))
    torch.testing.assert_close(out.z_q, theirs[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(out.indices, indices[0].to(out.indices.dtype))


@pytest.mark.parametrize(
    ("z", "levels", "error", "text"),
    [
        (np.zeros((2, 2), int), [3, 3], TypeError, "quantize: z must have a real floating dtype .* got int64"),
        (np.zeros((2, 2)), [3], ValueError, r"quantize: z must have shape \(..., D\) with D = 1, .* got \(2, 2\)"),
        (np.zeros((2, 2)), [3, 2], ValueError, r"FSQ: levels must be .* integers >= 3, .* got \[3, 2\]"),
        (np.zeros((2, 2)), [], ValueError, r"FSQ: levels must be .* got \[\]"),
        (np.zeros((2, 2)), [3, 3.5], TypeError, "FSQ: levels must be .* got 3.5 of builtins.float"),
        (np.zeros((2, 2)), 3, TypeError, "FSQ: levels must be .* got builtins.int"),
        (
            np.zeros((2, 2)),
            [2**40, 2**40],
            ValueError,
            "quantize: the product of levels must be at most 9223372036854775808",
        ),
        (np.full((2, 2), np.nan), [3, 3], ValueError, "quantize: z must be finite, got NaN or infinity in z"),
    ],
)
def test_errors(z: np.ndarray, levels: Any, error: type, text: str) -> None:
    with pytest.raises(error, match=f"^{text}"):
        dq.quantize(z, None, dq.FSQ(levels))


def test_errors_of_decoding_and_of_the_pullback() -> None:
    with pytest.raises(TypeError, match=r"^decode: indices must have an integer dtype, got float64"):
        dq.decode(np.zeros(2), None, dq.FSQ([3]))
    with pytest.raises(
        ValueError, match=r"^decode: indices must lie in \[0, product of levels\) .* = 3, .* from 0 to 3"
    ):
        dq.decode(np.array([0, 3]), None, dq.FSQ([3]))
    _, pullback = dq.vjp(np.zeros((2, 1)), None, dq.FSQ([3]))
    with pytest.raises(ValueError, match=r"^pullback: g must have the shape of z_q, \(2, 1\), got \(2,\)"):
        pullback(np.ones(2))


STAGED = {
    "residual": lambda levels: dq.Residual(dq.FSQ(levels), 3),
    "product": lambda levels: dq.Product(dq.FSQ(levels), 2),
    "groups in stages": lambda levels: dq.Residual(dq.Product(dq.FSQ(levels), 2), 3),
    "stages in groups": lambda levels: dq.Product(dq.Residual(dq.FSQ(levels), 3), 2),
}


def staged(name: str) -> tuple[Any, np.ndarray, tuple[int, ...]]:
    """A composite of FSQ, vectors that it takes, and the levels of each of their coordinates."""
    levels = (4, 7, 8)
    groups = 1 if name == "residual" else 2
    z = np.random.default_rng(0).standard_normal((2, 9, groups * len(levels))) * 1.5
    return STAGED[name](levels), z, levels * groups


@pytest.mark.parametrize("name", STAGED)
def test_composites_are_straight_through_the_bound(library: Library, name: str) -> None:
    """Whatever the number of stages, the derivative is the bound's; each verb gives the same; tokens decode exactly."""
    estimator, z, levels = staged(name)
    z, g = z.astype(np.float32), np.random.default_rng(1).standard_normal(z.shape).astype(np.float32)
    leaf = torch.tensor(z, dtype=torch.float64).requires_grad_()
    (g_z,) = torch.autograd.grad(plain(torch, torch.detach, leaf, levels), leaf, torch.tensor(g, dtype=torch.float64))
    size = 2 * constants(levels)[0] / constants(levels)[3] * np.abs(g)
    ours = [to_library(library, x, "float32") for x in (z, g)]
    out, pullback = dq.vjp(ours[0], None, estimator)
    same, tangent = dq.jvp(ours[0], None, ours[1], None, estimator)
    again = dq.quantize(ours[0], None, estimator=estimator)
    back, nothing = pullback(ours[1])
    assert nothing is None
    assert_within(back, g_z.numpy(), size, "float32", library, 16)
    assert_within(tangent, g_z.numpy(), size, "float32", library, 16)
    for other in (same, again):
        np.testing.assert_array_equal(library.back(other.z_q), library.back(out.z_q))
        np.testing.assert_array_equal(library.back(other.indices), library.back(out.indices))
    decoded = dq.decode(out.indices, None, estimator, dtype=ours[0].dtype)
    np.testing.assert_array_equal(library.back(decoded), library.back(out.z_q))
    given = dq.quantize(ours[0], None, estimator, indices=out.indices)
    np.testing.assert_array_equal(library.back(given.z_q), library.back(out.z_q))


@pytest.mark.parametrize("name", ["torch", "jax"])
@pytest.mark.parametrize("composite", STAGED)
def test_composites_differentiate_twice(name: str, composite: str) -> None:
    library = library_named(name)
    estimator, z, levels = staged(composite)
    with precision(library, "float64"):
        z, g = library.to(z), library.to(np.random.default_rng(1).standard_normal(z.shape))
        if name == "torch":
            leaf = z.clone().requires_grad_()
            (first,) = torch.autograd.grad(dq.quantize(leaf, None, estimator).z_q, leaf, g, create_graph=True)
            (second,) = torch.autograd.grad((first**2).sum(), leaf)
            expected = plain(torch, torch.detach, leaf, levels)
            (want,) = torch.autograd.grad(expected, leaf, g, create_graph=True)
            (want_second,) = torch.autograd.grad((want**2).sum(), leaf)
        else:
            import jax

            def pulled(function: Any) -> tuple[Any, Any]:
                first = lambda z: jax.vjp(function, z)[1](g)[0]  # noqa: E731
                return first(z), jax.grad(lambda z: (first(z) ** 2).sum())(z)

            first, second = pulled(lambda z: dq.quantize(z, None, estimator).z_q)
            want, want_second = pulled(lambda z: plain(jax.numpy, jax.lax.stop_gradient, z, levels))
        # Numbers of order one, ten operations.
        np.testing.assert_allclose(library.back(first), library.back(want), rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(library.back(second), library.back(want_second), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("level", [3, 4, 5, 8, 16])
def test_each_stage_divides_the_cells_of_the_one_before(level: int) -> None:
    z = np.linspace(-9, 9, 2001)[:, None]
    half, offset, shift, width = constants((level,))
    x = (np.tanh(z + shift) * half - offset) / width
    for stages in (1, 2, 3, 4):
        out = dq.quantize(z, None, dq.Residual(dq.FSQ([level]), stages))
        step = 1 / (level // 2 * float(level) ** (stages - 1))
        # Half a step, and what the sums of a few stages round.
        assert np.abs(out.z_q - x).max() <= step / 2 + 1e-14
        assert set(np.unique(out.indices)) <= set(range(level))
    np.testing.assert_array_equal(
        dq.quantize(z, None, dq.Residual(dq.FSQ([level]), 1)).z_q, dq.quantize(z, None, dq.FSQ([level])).z_q
    )


def test_a_dropped_stage_adds_nothing(library: Library) -> None:
    estimator, z, _ = staged("residual")
    z = library.to(z.astype(np.float32))
    indices = library.back(dq.quantize(z, None, estimator).indices).copy()
    indices[0, :, 1:] = -1
    out, pullback = dq.vjp(z, None, estimator, indices=library.to(indices))
    first, first_pullback = dq.vjp(z, None, dq.Residual(estimator.estimator, 1))
    np.testing.assert_array_equal(library.back(out.z_q)[0], library.back(first.z_q)[0])
    decoded = dq.decode(library.to(indices), None, estimator, dtype=z.dtype)
    np.testing.assert_array_equal(library.back(decoded), library.back(out.z_q))
    g = library.to(np.ones(tuple(z.shape), np.float32))
    # The gradient passes by what is dropped.
    assert_close(pullback(g)[0], library.back(first_pullback(g)[0]), library, rtol=1e-6)
    lost, index = z * float("nan"), library.to(np.zeros((2, 9), int))
    assert np.isnan(library.back(dq.quantize(lost, None, estimator, check_finite=False).z_q)).all()
    assert tuple(dq.decode(index[0, 0], None, dq.FSQ([4, 4])).shape) == (2,)


def test_what_fsq_cannot_be_part_of() -> None:
    with pytest.raises(TypeError, match=r"^Residual: stages of FSQ must be those of one Residual"):
        dq.Residual(dq.Residual(dq.FSQ([5]), 2), 2)
    with pytest.raises(TypeError, match=r"^quantize: codebook must be None, since FSQ has none, got .* \(3, 2\)"):
        dq.quantize(np.zeros((2, 2)), np.zeros((3, 2)), dq.FSQ([5, 5]))
    with pytest.raises(TypeError, match=r"^jvp: dcodebook must be None where the codebook is"):
        dq.jvp(np.zeros((2, 1)), None, np.zeros((2, 1)), np.zeros((2, 1)), dq.FSQ([5]))
    with pytest.raises(ValueError, match=r"^quantize: z must have shape .* D = 2, one for each level, got \(2, 3\)"):
        dq.quantize(np.zeros((2, 6)), None, dq.Product(dq.FSQ([5, 5]), 2))


def test_stages_of_one_that_reads_its_output_are_refused() -> None:
    class Reading(dq.FSQ):
        @property
        def reads(self):
            return frozenset(("z", "q"))

    with pytest.raises(
        TypeError, match=r"^Residual: an FSQ in stages must read z alone, got .*Reading, which reads q$"
    ):
        dq.Residual(Reading([3, 3]), 2)


class Spoken(dq.FSQ):
    """A rule of its own, of z alone."""

    def vjp(self, lib, z, q, noise, g):
        return super().vjp(lib, z, q, noise, 2 * g)

    def jvp(self, lib, z, q, noise, dz, dq):
        return super().jvp(lib, z, q, noise, 2 * dz, dq)


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize(
    "chosen",
    [lambda z, q: q, lambda z, q: z == q, lambda z, q: 1.0 if q is None else q, lambda z, q: q[..., :1] > 0],
    ids=["product", "equal", "where there is one", "sign"],
)
def test_stages_of_one_that_reads_its_output_and_does_not_say_so_are_refused(name: str, chosen) -> None:
    library = library_named(name)

    class Silent(dq.FSQ):
        def vjp(self, lib, z, q, noise, g):
            return g * chosen(z, q), None

        def jvp(self, lib, z, q, noise, dz, dq):
            return dz * chosen(z, q)

    # A library that knows no other types, as array-api-strict, refuses in its own words.
    z = library.to(np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32))
    text = r"^Residual: the vjp and jvp of an FSQ in stages must read z alone, got one that reads q$"
    with pytest.raises(TypeError, match=text):
        dq.vjp(z, None, dq.Residual(Silent([5, 4]), 2))[1](z)
    with pytest.raises(TypeError, match=text):
        dq.jvp(z, None, z, None, dq.Residual(Silent([5, 4]), 2))
    twice = dq.vjp(z, None, dq.Residual(Spoken([5, 4]), 2))[1](z)[0]
    plain = dq.vjp(z, None, dq.Residual(dq.FSQ([5, 4]), 2))[1](z)[0]
    assert_close(twice, 2 * library.back(plain), library, rtol=1e-6)


@pytest.mark.parametrize("name", ["forward", "level", "rounded", "decode"])
def test_stages_of_one_with_levels_of_its_own_are_refused(name: str) -> None:
    own = type("Own", (dq.FSQ,), {name: lambda self, *_: None})
    with pytest.raises(TypeError, match=rf"^Residual: an FSQ in stages must leave {name} as it is, .*, got .*Own$"):
        dq.Residual(own([3, 3]), 2)
