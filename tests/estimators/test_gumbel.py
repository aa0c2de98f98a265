"""Straight-through Gumbel-softmax against plain automatic differentiation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import diveq_core as dq
from libraries import Library, assert_close, library_named
from strategies import EPS, ROUNDINGS, assert_within, dtypes_of, example_count, precision, round_to, to_library

torch = pytest.importorskip("torch", reason="torch's automatic differentiation is the reference")

# (shape of logits, D); few, because JAX compiles for each.
SHAPES = (((2, 3, 5), 4), ((4, 1), 2), ((3, 4), 1))
NAMES = ("logits", "codebook", "noise", "g", "dlogits", "dcodebook")


@st.composite
def problems(draw: st.DrawFn) -> tuple[float, dict[str, np.ndarray]]:
    """A temperature, inputs, a cotangent and tangents; the two largest of a row are clearly apart."""
    shape, width = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = (shape, (shape[-1], width), shape, (*shape[:-1], width), shape, (shape[-1], width))
    p = {name: rng.standard_normal(s) for name, s in zip(NAMES, shapes, strict=True)}
    p["noise"] = rng.gumbel(size=shape)
    winner = rng.integers(0, shape[-1], shape[:-1])
    p["logits"] = p["logits"] + (np.arange(shape[-1]) == winner[..., None]) * 0.125
    total = np.sort(p["logits"] + p["noise"], axis=-1)
    if shape[-1] > 1 and np.min(total[..., -1] - total[..., -2]) < 0.05:
        p["noise"] = np.zeros(shape)
        p["logits"] = rng.permuted(np.broadcast_to(np.arange(shape[-1]) / 2.0, shape).copy(), axis=-1)
    return draw(st.sampled_from([0.5, 1.0, 4.0])), p


def plain(xp: Any, softmax: Any, sg: Any, logits: Any, codebook: Any, noise: Any, tau: float) -> Any:
    """``(onehot + y - sg[y]) E``."""
    y = softmax((logits + noise) / tau)
    chosen = xp.argmax(logits + noise, -1)[..., None] == xp.arange(logits.shape[-1])
    hard = xp.where(chosen, xp.ones_like(logits), xp.zeros_like(logits))
    return (hard + y - sg(y)) @ codebook


def in_torch(*arguments: Any) -> Any:
    return plain(torch, lambda x: torch.softmax(x, dim=-1), torch.detach, *arguments)


def in_jax(*arguments: Any) -> Any:
    import jax

    return plain(jax.numpy, jax.nn.softmax, jax.lax.stop_gradient, *arguments)


def expected(tau: float, p: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    t = {name: torch.tensor(x).requires_grad_() for name, x in p.items()}
    z_q = in_torch(t["logits"], t["codebook"], t["noise"].detach(), tau)
    g_logits, g_codebook = torch.autograd.grad(z_q, (t["logits"], t["codebook"]), t["g"], create_graph=True)
    pushed = (g_logits * t["dlogits"]).sum() + (g_codebook * t["dcodebook"]).sum()
    (tangent,) = torch.autograd.grad(pushed, t["g"])
    results = {"z_q": z_q, "g_logits": g_logits, "g_codebook": g_codebook, "tangent": tangent}
    return {name: x.detach().numpy() for name, x in results.items()}


def sizes(tau: float, p: dict[str, np.ndarray]) -> dict[str, Any]:
    """Magnitudes behind each result; a logit's rounding is one of y after the division by tau."""
    lossy = 1 + np.max(np.abs(p["logits"]) + np.abs(p["noise"])) / tau
    largest = np.max(np.abs(p["codebook"]))
    return {
        "z_q": 0.0,
        "g_logits": lossy / tau * 2 * largest * np.sum(np.abs(p["g"]), axis=-1, keepdims=True),
        "g_codebook": np.sum(np.abs(p["g"])),
        "tangent": lossy / tau * 2 * largest * np.sum(np.abs(p["dlogits"]), axis=-1, keepdims=True)
        + np.max(np.abs(p["dcodebook"])),
    }


@settings(max_examples=example_count(0.5))
@given(data=st.data())
def test_verbs_are_plain_automatic_differentiation(library: Library, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(dtypes_of(library)))
    tau, p = data.draw(problems())
    p = {name: round_to(x, dtype) for name, x in p.items()}
    want, size, estimator = expected(tau, p), sizes(tau, p), dq.GumbelST(tau)
    with precision(library, dtype):
        a = {name: to_library(library, x, dtype) for name, x in p.items()}
        arguments, noise = (a["logits"], a["codebook"]), a["noise"]
        out, pullback = dq.vjp(*arguments, estimator, noise=noise)
        g_logits, g_codebook = pullback(a["g"])
        same, tangent = dq.jvp(*arguments, a["dlogits"], a["dcodebook"], estimator, noise=noise)
        again = dq.quantize(*arguments, estimator, noise=noise)
        got = {"z_q": out.z_q, "g_logits": g_logits, "g_codebook": g_codebook, "tangent": tangent}
        for name, value in got.items():
            if name != "z_q":
                assert_within(value, want[name], np.asarray(size[name]), dtype, library, ROUNDINGS)
        # Bit for bit: the codeword.
        indices = np.argmax(p["logits"] + p["noise"], axis=-1)
        for x in (out, same, again):
            np.testing.assert_array_equal(library.back(x.indices), indices)
            np.testing.assert_array_equal(library.back(x.z_q), p["codebook"][indices])


@pytest.mark.parametrize("name", ["torch", "jax"])
@settings(max_examples=example_count(0.2))
@given(problem=problems())
def test_differentiates_to_the_pullback_in_both_orders(name: str, problem: tuple) -> None:
    """``quantize`` and ``vjp`` against the expression, with every mixed derivative."""
    tau, p = problem
    library, estimator = library_named(name), dq.GumbelST(tau)
    with precision(library, "float64"):
        a = {key: library.to(x) for key, x in p.items()}
        noise, leaves = a["noise"], [a[key] for key in ("logits", "codebook", "g")]

        def ours(logits: Any, codebook: Any) -> Any:
            return dq.quantize(logits, codebook, estimator, noise=noise).z_q

        def explicit(logits: Any, codebook: Any, g: Any) -> Any:
            return dq.vjp(logits, codebook, estimator, noise=noise)[1](g)

        def reference(logits: Any, codebook: Any) -> Any:
            return (in_torch if name == "torch" else in_jax)(logits, codebook, noise, tau)

        def by_library(function: Any) -> Any:
            if name == "torch":
                return lambda x, e, g: torch.autograd.grad(function(x, e), (x, e), g, create_graph=True)
            import jax

            return lambda x, e, g: jax.vjp(function, x, e)[1](g)

        results = []
        for pull in (by_library(ours), explicit, by_library(reference)):

            def pushed(*leaves: Any, pull: Any = pull) -> Any:
                first = pull(*leaves)
                return (first[0] * a["dlogits"]).sum() + (first[1] * a["dcodebook"]).sum()

            if name == "torch":
                tracked = [x.clone().requires_grad_() for x in leaves]
                second = torch.autograd.grad(pushed(*tracked), tracked)
                results.append([*pull(*tracked), *second])
            else:
                import jax

                results.append([*pull(*leaves), *jax.grad(pushed, argnums=(0, 1, 2))(*leaves)])
        for result in results[:2]:
            for got, want in zip(result, results[2], strict=True):
                # Numbers of order one, temperatures from 1/2.
                np.testing.assert_allclose(library.back(got), library.back(want), rtol=1e-11, atol=1e-12)


@given(problem=problems())
def test_pullback_and_pushforward_are_adjoint(library: Library, problem: tuple) -> None:
    tau, p = problem
    dtype = "float64" if library.float64 else "float32"
    p = {name: round_to(x, dtype) for name, x in p.items()}
    a = {name: library.to(x.astype(dtype)) for name, x in p.items()}
    estimator = dq.GumbelST(tau)
    _, pullback = dq.vjp(a["logits"], a["codebook"], estimator, noise=a["noise"])
    g_logits, g_codebook = (library.back(x).astype(float) for x in pullback(a["g"]))
    _, tangent = dq.jvp(a["logits"], a["codebook"], a["dlogits"], a["dcodebook"], estimator, noise=a["noise"])
    left = np.sum(p["g"] * library.back(tangent))
    right = np.sum(g_logits * p["dlogits"]) + np.sum(g_codebook * p["dcodebook"])
    size = np.sum(np.abs(p["g"])) * np.max(sizes(tau, p)["tangent"]) * 2
    assert abs(left - right) <= ROUNDINGS * EPS[dtype] * size


def test_extremes_are_finite(library: Library) -> None:
    """Logits of any size at any temperature; ties to the lowest; rows that are not finite."""
    logits = np.array([[1e38, -1e38, 0], [1e-38, 0, -1e-38], [2, 2, 2], [np.nan, 0, 1]], np.float32)
    codebook = np.array([[1.0, 2.0], [3.0, 5.0], [7.0, 11.0]], np.float32)
    noise = library.to(np.zeros_like(logits))
    for tau in (1.0, 1e30, 1e308, 1e-308):
        out, pullback = dq.vjp(
            library.to(logits), library.to(codebook), dq.GumbelST(tau), noise=noise, check_finite=False
        )
        np.testing.assert_array_equal(library.back(out.indices), [0, 0, 0, -1])
        np.testing.assert_array_equal(library.back(out.z_q)[:3], codebook[[0, 0, 0]])
        assert np.all(np.isnan(library.back(out.z_q)[3]))
        g_logits = library.back(pullback(library.to(np.ones((4, 2), np.float32)))[0])
        # Infinite where the derivative is, but never NaN.
        assert not np.any(np.isnan(g_logits[:3]))
        if tau < 1.0:
            np.testing.assert_array_equal(g_logits[0], 0)
        if tau == 1.0:
            assert np.all(np.isfinite(g_logits[:3]))
            np.testing.assert_array_equal(g_logits[0], 0)


def test_a_row_that_is_not_finite_adds_nothing_to_the_codebook(library: Library) -> None:
    rng = np.random.default_rng(0)
    logits, codebook, noise = (rng.standard_normal(s).astype(np.float32) for s in ((4, 3), (3, 2), (4, 3)))
    g = rng.standard_normal((4, 2)).astype(np.float32)
    logits[1, 2], g[1] = np.nan, np.nan
    kept = [0, 2, 3]
    _, whole = dq.vjp(logits[kept], codebook, dq.GumbelST(0.5), noise=noise[kept])
    expected = whole(g[kept])
    a, e, n, g_ = (library.to(x) for x in (logits, codebook, noise, g))
    if library.name == "torch":
        a = a.requires_grad_()
    _, pullback = dq.vjp(a, e, dq.GumbelST(0.5), noise=n, check_finite=False)
    g_logits, g_codebook = pullback(g_)
    # Sums of three numbers of order one.
    assert_close(g_codebook, expected[1], library, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(library.back(g_logits)[kept], expected[0], rtol=1e-5, atol=1e-6)


def test_second_derivatives_leave_out_a_row_that_is_not_finite() -> None:
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(1)
    logits, codebook, noise = (rng.standard_normal(s).astype(np.float32) for s in ((4, 3), (3, 2), (4, 3)))
    logits[1, 2] = np.nan

    def first(e: Any, rows: Any) -> Any:
        def loss(e: Any) -> Any:
            z_q = dq.quantize(logits_[rows], e, dq.GumbelST(), noise=noise_[rows]).z_q
            return jax.numpy.nansum(z_q * z_q)

        return (jax.grad(loss)(e) ** 2).sum()

    logits_, noise_ = jax.numpy.asarray(logits), jax.numpy.asarray(noise)
    whole, kept = (jax.grad(first)(jax.numpy.asarray(codebook), np.array(r)) for r in ([0, 1, 2, 3], [0, 2, 3]))
    # float32 of order ten.
    np.testing.assert_allclose(whole, kept, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "count"), [(0, 3), (2, 1)])
def test_no_rows_and_one_codeword(library: Library, rows: int, count: int) -> None:
    logits, codebook = np.zeros((rows, count), np.float32), np.ones((count, 2), np.float32)
    out, pullback = dq.vjp(library.to(logits), library.to(codebook), dq.GumbelST(), noise=library.to(logits))
    assert_close(out.z_q, np.ones((rows, 2), np.float32), library)
    g_logits, g_codebook = pullback(out.z_q)
    assert_close(g_logits, logits, library)
    assert_close(g_codebook, np.full((count, 2), rows, np.float32), library)


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_drawn_noise_chooses_by_the_softmax(name: str) -> None:
    """Gumbel's theorem, by chi-squared: 20000 draws, three degrees of freedom, one failure in 1e6."""
    library, logits = library_named(name), np.log([0.1, 0.2, 0.3, 0.4]).astype(np.float32)
    if name == "jax":
        import jax

        rng = jax.random.key(0)
    else:
        rng = np.random.default_rng(0) if name == "numpy" else torch.Generator().manual_seed(0)
    tiled, codebook = library.to(np.tile(logits, (20000, 1))), library.to(np.eye(4, dtype=np.float32))
    out = dq.quantize(tiled, codebook, dq.GumbelST(), rng=rng)
    counts, want = np.bincount(library.back(out.indices), minlength=4), 20000 * np.exp(logits)
    assert np.sum((counts - want) ** 2 / want) < 30.7


def test_agrees_with_torch_s_own() -> None:
    """``F.gumbel_softmax(hard=True) @ E`` under the same noise."""
    generator = np.random.default_rng(0)
    logits, codebook, g = (torch.tensor(generator.standard_normal(s)) for s in ((6, 4), (4, 3), (6, 3)))
    torch.manual_seed(1)
    noise = -torch.empty_like(logits).exponential_().log()
    torch.manual_seed(1)
    leaves = [logits.requires_grad_(), codebook.requires_grad_()]
    theirs = torch.nn.functional.gumbel_softmax(logits, tau=0.7, hard=True) @ codebook
    ours = dq.quantize(logits, codebook, dq.GumbelST(0.7), noise=noise).z_q
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, leaves, g) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torch_transformations() -> None:
    rng = np.random.default_rng(0)
    logits, noise, dlogits = (torch.tensor(rng.standard_normal((3, 5, 4))) for _ in range(3))
    codebook, estimator = torch.tensor(rng.standard_normal((4, 2))), dq.GumbelST(0.5)

    def quantize(logits: Any, noise: Any) -> Any:
        return dq.quantize(logits, codebook, estimator, noise=noise).z_q

    want, pullback = dq.vjp(logits, codebook, estimator, noise=noise)
    g_logits = pullback(torch.ones_like(want.z_q))[0]
    torch.testing.assert_close(torch.func.vmap(quantize)(logits, noise), want.z_q, rtol=0, atol=0)
    batched = torch.func.vmap(torch.func.grad(lambda x, n: quantize(x, n).sum()))(logits, noise)
    torch.testing.assert_close(batched, g_logits, rtol=1e-12, atol=1e-12)
    tangent = dq.jvp(logits, codebook, dlogits, 0 * codebook, estimator, noise=noise)[1]
    pushed = torch.func.jvp(lambda x: quantize(x, noise), (logits,), (dlogits,))[1]
    torch.testing.assert_close(pushed, tangent, rtol=1e-12, atol=1e-12)
    compiled = torch.compile(quantize, fullgraph=True, backend="aot_eager")
    leaf = logits.clone().requires_grad_()
    got = torch.autograd.grad(compiled(leaf, noise).sum(), leaf)[0]
    torch.testing.assert_close(got, g_logits, rtol=1e-12, atol=1e-12)


def test_jax_transformations() -> None:
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        logits, noise, dlogits = (jax.numpy.asarray(rng.standard_normal((3, 5, 4))) for _ in range(3))
        codebook, estimator = jax.numpy.asarray(rng.standard_normal((4, 2))), dq.GumbelST(0.5)

        def quantize(logits: Any, noise: Any) -> Any:
            return dq.quantize(logits, codebook, estimator, noise=noise).z_q

        want, pullback = dq.vjp(logits, codebook, estimator, noise=noise)
        g_logits = pullback(jax.numpy.ones_like(want.z_q))[0]
        np.testing.assert_array_equal(jax.jit(jax.vmap(quantize))(logits, noise), want.z_q)
        batched = jax.jit(jax.vmap(jax.grad(lambda x, n: quantize(x, n).sum())))(logits, noise)
        np.testing.assert_allclose(batched, g_logits, rtol=1e-12, atol=1e-12)
        tangent = dq.jvp(logits, codebook, dlogits, 0 * codebook, estimator, noise=noise)[1]
        pushed = jax.jvp(lambda x: quantize(x, noise), (logits,), (dlogits,))[1]
        np.testing.assert_allclose(pushed, tangent, rtol=1e-12, atol=1e-12)


def test_errors() -> None:
    logits, codebook, estimator = np.zeros((2, 3)), np.zeros((3, 4)), dq.GumbelST()
    with pytest.raises(ValueError, match=r"^GumbelST: temperature must be finite and > 0, got 0.0"):
        dq.GumbelST(0)
    with pytest.raises(TypeError, match=r"^GumbelST: temperature must be a real number > 0, got builtins.str"):
        dq.GumbelST("1")
    with pytest.raises(TypeError, match=r"^Residual: estimator must give vectors of the space .* got .*GumbelST"):
        dq.Residual(estimator, 2)
    with pytest.raises(ValueError, match=r"^quantize: z of GumbelST must be logits of shape .* K = 4 .* got \(2, 3\)"):
        dq.quantize(logits, np.zeros((4, 3)), estimator)
    with pytest.raises(TypeError, match=r"^quantize: z must have a real floating dtype"):
        dq.quantize(np.zeros((2, 3), int), codebook, estimator)
    with pytest.raises(ValueError, match=r"^quantize: noise must have the shape of z, \(2, 3\)"):
        dq.quantize(logits, codebook, estimator, noise=np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"^quantize: z must be finite"):
        dq.quantize(logits + np.nan, codebook, estimator)
    with pytest.raises(ValueError, match=r"^jvp: dz must have the shape of z, \(2, 3\)"):
        dq.jvp(logits, codebook, codebook, codebook, estimator)
    _, pullback = dq.vjp(logits, codebook, estimator)
    with pytest.raises(ValueError, match=r"^pullback: g must have the shape of z_q, \(2, 4\), got \(2, 3\)"):
        pullback(logits)


@pytest.mark.parametrize("name", ["torch", "jax"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's forward mode
def test_forward_over_forward_is_that_of_the_expression(name: str) -> None:
    """Tangents of tangents, in which the soft weights multiply the codewords' tangents."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in ((3, 4), (4, 2), (3, 4), (3, 4), (4, 2))]
    library, estimator = library_named(name), dq.GumbelST(0.7)
    with precision(library, "float64"):
        logits, codebook, noise, dlogits, dcodebook = (library.to(x) for x in arrays)
        if name == "torch":
            from torch.func import jvp
        else:
            from jax import jvp

        def ours(x: Any, e: Any) -> Any:
            return dq.quantize(x, e, estimator, noise=noise).z_q

        def reference(x: Any, e: Any) -> Any:
            return (in_torch if name == "torch" else in_jax)(x, e, noise, 0.7)

        def explicit(x: Any, e: Any) -> Any:
            return dq.jvp(x, e, dlogits, dcodebook, estimator, noise=noise)[1]

        def pushed(function: Any) -> Any:
            return lambda x, e: jvp(function, (x, e), (dlogits, dcodebook))[1]

        want = library.back(pushed(pushed(reference))(logits, codebook))
        assert np.abs(want).max() > 0.1
        for function in (pushed(ours), explicit):
            if name == "torch" and function is not explicit:
                continue  # torch has no forward mode of a Function's forward mode
            # Numbers of order one, a temperature of 0.7.
            np.testing.assert_allclose(library.back(pushed(function)(logits, codebook)), want, rtol=1e-11, atol=1e-12)


# Codewords that are excluded


def excluding(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Logits of which half are -inf, in every row another number of them; codebook, noise, cotangent, tangents."""
    logits = rng.standard_normal((6, 5)).astype("f4")
    excluded = np.array(
        [[0, 1, 1, 0, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    )
    # The most probable, had it not been excluded.
    logits[excluded == 1] = 9
    shapes = (5, 3), (6, 5), (6, 3), (6, 5), (5, 3)
    codebook, noise, g, dlogits, dcodebook = (rng.standard_normal(shape).astype("f4") for shape in shapes)
    return np.where(excluded == 1, np.float32(-np.inf), logits), codebook, noise, g, dlogits, dcodebook


def test_a_logit_of_minus_infinity_excludes_its_codeword(library: Library) -> None:
    """As if the codeword were not there, also where values are checked."""
    logits, codebook, noise, g, dlogits, dcodebook = excluding(np.random.default_rng(0))
    ours = [library.to(x) for x in (logits, codebook, dlogits, dcodebook)]
    options = {"noise": library.to(noise), "check_finite": True}
    out, pullback = dq.vjp(*ours[:2], dq.GumbelST(0.5), **options)
    same = dq.quantize(*ours[:2], dq.GumbelST(0.5), **options)
    _, tangent = dq.jvp(*ours, dq.GumbelST(0.5), **options)
    g_logits, g_codebook = (library.back(x) for x in pullback(library.to(g)))
    np.testing.assert_array_equal(library.back(same.indices), library.back(out.indices))
    np.testing.assert_array_equal(g_logits[np.isinf(logits)], 0)
    want_codebook = np.zeros_like(codebook)
    for row in range(len(logits)):
        kept = np.flatnonzero(np.isfinite(logits[row]))
        here = {"noise": noise[row : row + 1, kept]}
        alone, back = dq.vjp(logits[row : row + 1, kept], codebook[kept], dq.GumbelST(0.5), **here)
        g_row, g_kept = back(g[row : row + 1])
        _, moved = dq.jvp(
            logits[row : row + 1, kept],
            codebook[kept],
            dlogits[row : row + 1, kept],
            dcodebook[kept],
            dq.GumbelST(0.5),
            **here,
        )
        assert library.back(out.indices)[row] == kept[alone.indices[0]]
        np.testing.assert_array_equal(library.back(out.z_q)[row], alone.z_q[0])
        # float32 of order one, in sums over five.
        np.testing.assert_allclose(g_logits[row, kept], g_row[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(library.back(tangent)[row], moved[0], rtol=1e-5, atol=1e-5)
        want_codebook[kept] += g_kept
    np.testing.assert_allclose(g_codebook, want_codebook, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_nothing_left_to_choose_is_lost(library: Library, dtype: str) -> None:
    if dtype == "float16" and not library.float16:
        pytest.skip(f"{library.name} has no float16")
    inf = np.inf
    logits = np.array([[-inf, -inf], [-inf, 0], [0, inf], [np.nan, -inf]], dtype)
    codebook, noise = np.array([[1.0], [2.0]], dtype), np.zeros((4, 2), dtype)
    checked = dq.quantize(*(library.to(x) for x in (logits[:2], codebook)), dq.GumbelST(), noise=library.to(noise[:2]))
    assert library.back(checked.indices).tolist() == [-1, 1]
    with np.errstate(invalid="ignore"):
        out, pullback = dq.vjp(
            library.to(logits), library.to(codebook), dq.GumbelST(), noise=library.to(noise), check_finite=False
        )
        g_codebook = library.back(pullback(library.to(np.ones((4, 1), dtype)))[1])
    np.testing.assert_array_equal(library.back(out.indices), [-1, 1, -1, -1])
    np.testing.assert_array_equal(library.back(out.z_q)[:, 0], [np.nan, 2, np.nan, np.nan])
    assert g_codebook[:, 0].tolist() == [0, 1]
    for row in (2, 3):
        with pytest.raises(ValueError, match=r"^quantize: z must be finite"):
            dq.quantize(
                library.to(logits[row:]),
                library.to(codebook),
                dq.GumbelST(),
                noise=library.to(noise[row:]),
                check_finite=True,
            )
    with pytest.raises(ValueError, match=r"^quantize: codebook must be finite"):
        dq.quantize(
            library.to(logits[:2]),
            library.to(np.full_like(codebook, -np.inf)),
            dq.GumbelST(),
            noise=library.to(noise[:2]),
            check_finite=True,
        )


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_derivatives_of_both_orders_leave_out_what_is_excluded(name: str) -> None:
    library = library_named(name)
    logits, codebook, noise, g, *_ = (library.to(x) for x in excluding(np.random.default_rng(1)))
    estimator = dq.GumbelST(0.5)

    def loss(x: Any, e: Any) -> Any:
        return (dq.quantize(x, e, estimator, noise=noise).z_q * g).sum()

    want = [library.back(x) for x in dq.vjp(logits, codebook, estimator, noise=noise)[1](g)]
    if name == "torch":
        leaves = [x.clone().requires_grad_() for x in (logits, codebook)]
        first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum((x * x).sum() for x in first), leaves)
    else:
        import jax

        first = jax.grad(loss, (0, 1))(logits, codebook)
        second = jax.grad(lambda x, e: sum((y * y).sum() for y in jax.grad(loss, (0, 1))(x, e)), (0, 1))(
            logits, codebook
        )
    for ours, theirs in zip(first, want, strict=True):
        # The same few operations in float32, perhaps in another order.
        np.testing.assert_allclose(library.back(ours), theirs, rtol=1e-5, atol=1e-5)
    excluded = np.isinf(library.back(logits))
    for ours in second:
        assert np.isfinite(library.back(ours)).all()
        assert np.any(library.back(ours) != 0)
    np.testing.assert_array_equal(library.back(second[0])[excluded], 0)


def test_groups_draw_each_for_itself(library: Library) -> None:
    """A product: logits side by side, one codebook for each group or one for all."""
    rng = np.random.default_rng(0)
    logits, noise = rng.standard_normal((2, 4, 6)), rng.gumbel(size=(2, 4, 6))
    g, codebooks = rng.standard_normal((2, 4, 10)), rng.standard_normal((2, 3, 5))
    logits, noise, g, codebooks = (x.astype(np.float32) for x in (logits, noise, g, codebooks))
    estimator = dq.GumbelST(0.7)
    for shared in (False, True):
        words = codebooks[0] if shared else codebooks
        arrays = [library.to(x) for x in (logits, words)]
        out, pullback = dq.vjp(*arrays, dq.Product(estimator, 2), noise=library.to(noise))
        g_logits, g_words = pullback(library.to(g))
        _, tangent = dq.jvp(*arrays, *arrays, dq.Product(estimator, 2), noise=library.to(noise))
        totals = []
        for group in range(2):
            here, own = slice(3 * group, 3 * group + 3), words if shared else words[group]
            wide = slice(5 * group, 5 * group + 5)
            each = [library.to(np.ascontiguousarray(x)) for x in (logits[..., here], own)]
            options = {"noise": library.to(np.ascontiguousarray(noise[..., here]))}
            alone, back = dq.vjp(*each, estimator, **options)
            g_l, g_e = back(library.to(np.ascontiguousarray(g[..., wide])))
            totals.append(library.back(g_e))
            moved = dq.jvp(*each, *each, estimator, **options)[1]
            for whole, part in ((out.z_q, alone.z_q), (tangent, moved)):
                np.testing.assert_array_equal(library.back(whole)[..., wide], library.back(part))
            np.testing.assert_array_equal(library.back(out.indices)[..., group], library.back(alone.indices))
            np.testing.assert_array_equal(library.back(g_logits)[..., here], library.back(g_l))
        assert_close(g_words, totals[0] + totals[1] if shared else np.stack(totals), library, rtol=1e-6, atol=1e-6)
        decoded = dq.decode(out.indices, arrays[1], dq.Product(estimator, 2))
        np.testing.assert_array_equal(library.back(decoded), library.back(out.z_q))
