"""The rotation trick against plain automatic differentiation, and at its degenerate places."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import diveq_core as dq
from libraries import Library, assert_close, library_named
from reference import norm, total
from strategies import (
    EPS,
    ROUNDINGS,
    SECOND_ROUNDINGS,
    SHAPES,
    Problem,
    assert_within,
    dtypes_of,
    example_count,
    precision,
    problems,
    to_library,
)

if TYPE_CHECKING:
    from collections.abc import Callable

torch = pytest.importorskip("torch", reason="torch's automatic differentiation is the reference")

ROTATION = dq.Rotation()


def opposite(z: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Whether vectors are antiparallel; what the strategies draw is so exactly or not nearly."""
    inner, lengths = total(np, z * q), norm(np, z) * norm(np, q)
    return (inner < 0) & (lengths**2 - inner**2 <= 1e-14 * lengths**2)


def expression(xp: Any, sg: Callable[[Any], Any], z: Any, q: Any, anti: Any, zero: Any) -> Any:
    """``sg[s R] z`` as in the paper, and ``z + sg[q - z]`` where z = 0."""
    one = xp.ones_like(z)
    anti = anti | (norm(xp, q) == 0)
    z_safe = xp.where(zero, one, z)
    q_safe = xp.where(norm(xp, q) == 0, one, q)
    s = sg(norm(xp, q) / norm(xp, z_safe))
    z_hat, q_hat = sg(z_safe / norm(xp, z_safe)), sg(q_safe / norm(xp, q_safe))
    middle = xp.where(anti, one, z_hat + q_hat)
    w = sg(xp.where(anti, xp.zeros_like(z), middle / norm(xp, middle)))
    turned = z_safe - 2 * w * total(xp, w * z_safe) + 2 * q_hat * total(xp, z_hat * z_safe)
    mirrored = z_safe - 2 * z_hat * total(xp, z_hat * z_safe)
    return xp.where(zero, z + sg(q - z), s * xp.where(anti, mirrored, turned))


def of_problem(p: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are antiparallel, rows whose z is 0."""
    return opposite(p.z, p.q) & (norm(np, p.z) > 0) & (norm(np, p.q) > 0), norm(np, p.z) == 0


def expected(p: Problem) -> dict[str, np.ndarray]:
    """Torch's differentiation of the expression in float64, and the size of what is rounded."""
    z, codebook, g = (torch.tensor(x).requires_grad_() for x in (p.z, p.codebook, p.g))
    anti, zero = (torch.tensor(x) for x in of_problem(p))
    z_q = expression(torch, torch.detach, z, codebook[torch.tensor(p.indices)], anti, zero)
    (g_z,) = torch.autograd.grad(z_q, z, g, create_graph=True)
    tangent, to_z = torch.autograd.grad((g_z * torch.tensor(p.dz)).sum(), (g, z), materialize_grads=True)
    assert not to_z.any()
    zero_codebook = np.zeros_like(p.codebook)
    return {"z_q": p.q, "g_z": g_z.detach().numpy(), "g_codebook": zero_codebook, "tangent": tangent.numpy()}


def sizes(p: Problem) -> dict[str, np.ndarray]:
    """Every factor of R is at most 1; its plane is lost as the sine of an obtuse angle goes to 0."""
    a, b = norm(np, p.z), norm(np, p.q)
    product = np.where(a * b == 0, 1, a * b)
    cosine = np.clip(total(np, p.z * p.q) / product, -1, 1)
    anti, zero = of_problem(p)
    lossy = np.where((cosine < 0) & ~anti & (a * b > 0), 1 / np.sqrt(np.maximum(1 - cosine**2, 1e-15)), 1)
    s = np.where(zero, 1, b / np.where(zero, 1, a))
    whole = {name: s * lossy * (np.abs(x) + 8 * norm(np, x)) for name, x in (("g_z", p.g), ("tangent", p.dz))}
    return whole | {"z_q": np.zeros_like(p.z), "g_codebook": np.zeros_like(p.codebook)}


def verbs(library: Library, p: Problem, dtype: str) -> dict[str, Any]:
    a = {name: to_library(library, getattr(p, name), dtype) for name in ("z", "codebook", "g", "dz", "dcodebook")}
    indices = library.to(p.indices.astype(np.int32))
    out, pullback = dq.vjp(a["z"], a["codebook"], ROTATION, indices=indices)
    g_z, g_codebook = pullback(a["g"])
    _, tangent = dq.jvp(a["z"], a["codebook"], a["dz"], a["dcodebook"], ROTATION, indices=indices)
    return {"z_q": out.z_q, "g_z": g_z, "g_codebook": g_codebook, "tangent": tangent}


@given(data=st.data())
def test_verbs_are_plain_automatic_differentiation(library: Library, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(dtypes_of(library)))
    p = data.draw(problems()).rounded(dtype)
    want, size = expected(p), sizes(p)
    with precision(library, dtype):
        for name, value in verbs(library, p, dtype).items():
            assert_within(value, want[name], size[name], dtype, library, ROUNDINGS)


@given(p=problems())
def test_pullback_and_pushforward_are_adjoint(library: Library, p: Problem) -> None:
    dtype = "float64" if library.float64 else "float32"
    p = p.rounded(dtype)
    got = {name: library.back(x).astype(np.float64) for name, x in verbs(library, p, dtype).items()}
    difference = np.sum(p.g * got["tangent"]) - np.sum(p.dz * got["g_z"])
    size = sizes(p)
    # R and its transpose are of the same p, so the plane's own uncertainty cancels; it stays in the bound all the same.
    scale = np.sum(np.abs(p.g) * size["tangent"]) + np.sum(np.abs(p.dz) * size["g_z"])
    assert abs(difference) <= ROUNDINGS * EPS[dtype] * scale


@pytest.mark.parametrize("name", ["torch", "jax"])
@settings(max_examples=example_count(0.3))
@given(p=problems(shapes=SHAPES[:2]))
def test_quantize_differentiates_to_the_same(name: str, p: Problem) -> None:
    """Reverse mode of ``quantize``, and reverse over reverse: linear in g, constant in z and codebook."""
    library, want, size = library_named(name), expected(p), sizes(p)
    with precision(library, "float64"):
        z, codebook, g, dz = (library.to(x) for x in (p.z, p.codebook, p.g, p.dz))
        indices = library.to(p.indices)

        def quantize(z: Any, codebook: Any) -> Any:
            return dq.quantize(z, codebook, ROTATION, indices=indices).z_q

        if name == "torch":
            leaves = [x.requires_grad_() for x in (z, codebook, g)]
            g_z, g_codebook = torch.autograd.grad(
                quantize(z, codebook), leaves[:2], g, create_graph=True, materialize_grads=True
            )
            second = torch.autograd.grad((g_z * dz).sum(), leaves, materialize_grads=True)
        else:
            import jax

            def pulled(z: Any, codebook: Any, g: Any) -> Any:
                return jax.vjp(quantize, z, codebook)[1](g)

            g_z, g_codebook = pulled(z, codebook, g)
            second = jax.grad(lambda *leaves: (pulled(*leaves)[0] * dz).sum(), argnums=(0, 1, 2))(z, codebook, g)
        assert_within(g_z, want["g_z"], size["g_z"], "float64", library, ROUNDINGS)
        assert_within(second[2], want["tangent"], size["tangent"], "float64", library, SECOND_ROUNDINGS)
        for zero in (g_codebook, *second[:2]):
            np.testing.assert_array_equal(library.back(zero), 0)


@settings(max_examples=example_count(0.3))
@given(p=problems(shapes=SHAPES[:1]))
def test_jax_differentiates_the_expression_alike(p: Problem) -> None:
    jax = pytest.importorskip("jax")
    anti, zero = of_problem(p)
    with jax.enable_x64(True):

        def plain(z: Any) -> Any:
            return expression(jax.numpy, jax.lax.stop_gradient, z, jax.numpy.asarray(p.q), anti, zero)

        _, pullback = jax.vjp(plain, jax.numpy.asarray(p.z))
        (g_z,) = pullback(jax.numpy.asarray(p.g))
    assert np.all(np.abs(np.asarray(g_z) - expected(p)["g_z"]) <= ROUNDINGS * EPS["float64"] * sizes(p)["g_z"])


EXTREME = [("float32", s) for s in (-100, -60, 50, 100)] + [("float64", -500), ("float64", 500)]


@pytest.mark.parametrize(("dtype", "power"), EXTREME)
@settings(max_examples=example_count(0.3))
@given(p=problems())
def test_extreme_scales(library: Library, dtype: str, power: int, p: Problem) -> None:
    """s and R do not depend on a scale that z and the codebook share."""
    if dtype not in dtypes_of(library):
        pytest.skip(f"{library.name} has no float64")
    p = p.rounded(dtype)
    want, size = expected(p), sizes(p)
    scaled = replace(p, z=p.z * 2.0**power, codebook=p.codebook * 2.0**power)
    with precision(library, dtype):
        got = verbs(library, scaled, dtype)
        for name in ("g_z", "g_codebook", "tangent"):
            assert_within(got[name], want[name], size[name], dtype, library, ROUNDINGS)


@given(p=problems())
def test_rotation_takes_z_to_q_and_keeps_lengths(p: Problem) -> None:
    r"""``s R z = q`` and ``|s R^T g| = s |g|``, antiparallel vectors and those nearly so included."""
    rng = np.random.default_rng(int(np.abs(p.g).sum() * 1e6))
    near = -2 * p.q + rng.standard_normal(p.q.shape) * rng.choice([0.0, 1e-16, 1e-12, 1e-8, 1e-4], (*p.q.shape[:-1], 1))
    for z in (p.z, near):
        rows = (norm(np, z) > 0) & (norm(np, p.q) > 0)
        _, tangent = dq.jvp(z, p.codebook, z, p.codebook, ROTATION, indices=p.indices)
        # Direction to rounding, with the threshold of 16 roundings below which a sine is read as 0.
        error = norm(np, tangent - p.q)
        assert np.all((error <= 2 * ROUNDINGS * EPS["float64"] * norm(np, p.q))[rows])
        _, pullback = dq.vjp(z, p.codebook, ROTATION, indices=p.indices)
        g_z, _ = pullback(p.g)
        s = norm(np, p.q)[rows] / norm(np, z)[rows]
        np.testing.assert_allclose(norm(np, g_z)[rows], s * norm(np, p.g)[rows], rtol=ROUNDINGS * EPS["float64"])


def test_degenerate_places(library: Library) -> None:
    """Equal, z = 0, q = 0, both 0, antiparallel up to rounding in each coordinate."""
    third = np.float32(1 / 3)
    z = np.array([[0.1, 0.2, 0.7], [0, 0, 0], [1, 2, 3], [0, 0, 0], [third, third, third]], np.float32)
    q = np.array([[0.1, 0.2, 0.7], [1, 2, 3], [0, 0, 0], [0, 0, 0], [-0.1, -0.1, -0.1]], np.float32)
    g = np.array([[1.0, 2.0, 4.0]] * 5, np.float32)
    out, pullback = dq.vjp(library.to(z), library.to(q), ROTATION, indices=library.to(np.arange(5)))
    g_z, g_codebook = pullback(library.to(g))
    _, tangent = dq.jvp(
        library.to(z), library.to(q), library.to(g), library.to(q), ROTATION, indices=library.to(np.arange(5))
    )
    # The reflection through the plane that z is normal to, times s = 0.3.
    mirrored = 0.3 * (g[4] - 2 * np.mean(g[4]))
    want = np.stack([g[0], g[1], 0 * g[2], g[3], mirrored]).astype(np.float32)
    np.testing.assert_array_equal(library.back(out.z_q), q)
    # Rows 0 to 3 exactly; the last to a dozen roundings of numbers of order 1.
    for value in (g_z, tangent):
        np.testing.assert_array_equal(library.back(value)[:4], want[:4])
        assert_close(value, want, library, atol=1e-6)
    np.testing.assert_array_equal(library.back(g_codebook), 0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_dimension(library: Library, sign: float) -> None:
    z, codebook = np.array([[2.0], [-3.0]], np.float32), np.array([[6.0 * sign], [-9.0 * sign]], np.float32)
    _, pullback = dq.vjp(library.to(z), library.to(codebook), ROTATION, indices=library.to(np.array([0, 1])))
    g_z, _ = pullback(library.to(np.array([[1.0], [1.0]], np.float32)))
    assert_close(g_z, np.full((2, 1), 3 * sign, np.float32), library)


def test_no_rows(library: Library) -> None:
    empty, codebook = library.to(np.zeros((0, 3), np.float32)), library.to(np.ones((2, 3), np.float32))
    out, pullback = dq.vjp(empty, codebook, ROTATION)
    g_z, g_codebook = pullback(empty)
    assert_close(out.z_q, np.zeros((0, 3), np.float32), library)
    assert_close(g_z, np.zeros((0, 3), np.float32), library)
    assert_close(g_codebook, np.zeros((2, 3), np.float32), library)


def problem_in_numbers() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((6, 4)), rng.standard_normal((6, 4)), rng.standard_normal((6, 4))


# torch's forward mode does so when it is first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_torch_transformations() -> None:
    z, q, g = (torch.tensor(x) for x in problem_in_numbers())
    indices = torch.arange(6)

    def pulled(z: Any, q: Any, indices: Any, g: Any) -> Any:
        return torch.func.vjp(lambda z: dq.quantize(z, q, ROTATION, indices=indices).z_q, z)[1](g)[0]

    want = dq.vjp(z, q, ROTATION, indices=indices)[1](g)[0]
    batched = torch.func.vmap(pulled, in_dims=(0, None, 0, 0))(z[:, None], q, indices[:, None], g[:, None])
    torch.testing.assert_close(batched[:, 0], want, rtol=1e-13, atol=1e-13)

    def pushed(z: Any) -> Any:
        return torch.func.jvp(lambda z: dq.quantize(z, q, ROTATION, indices=indices).z_q, (z,), (g,))[1]

    want = dq.jvp(z, q, g, q, ROTATION, indices=indices)[1]
    torch.testing.assert_close(pushed(z), want, rtol=1e-13, atol=1e-13)


def test_torch_compiles_in_one_graph() -> None:
    z, q, g = (torch.tensor(x).requires_grad_() for x in problem_in_numbers())

    def step(z: Any, q: Any) -> Any:
        return dq.quantize(z, q, ROTATION, indices=torch.arange(6)).z_q

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(function(z, q), z, g)[0] for function in (step, compiled)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-13, atol=1e-13)


def test_jax_transformations() -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        z, q, g = (jax.numpy.asarray(x) for x in problem_in_numbers())
        indices = jax.numpy.arange(6)

        def quantize(z: Any, indices: Any) -> Any:
            return dq.quantize(z, q, ROTATION, indices=indices).z_q

        def pulled(z: Any, indices: Any, g: Any) -> Any:
            return jax.vjp(lambda z: quantize(z, indices), z)[1](g)[0]

        want = np.asarray(dq.vjp(z, q, ROTATION, indices=indices)[1](g)[0])
        batched = jax.jit(jax.vmap(pulled))(z[:, None], indices[:, None], g[:, None])[:, 0]
        np.testing.assert_allclose(batched, want, rtol=1e-13, atol=1e-13)
        tangent = jax.jit(lambda z, g: jax.jvp(lambda z: quantize(z, indices), (z,), (g,))[1])(z, g)
        want = np.asarray(dq.jvp(z, q, g, q, ROTATION, indices=indices)[1])
        np.testing.assert_allclose(tangent, want, rtol=1e-13, atol=1e-13)


def test_not_the_transpose_of_it() -> None:
    """vqrotate gives s R g, our pushforward, where the derivative of sg[s R] z is s R^T g."""
    peer = pytest.importorskip("vqrotate")
    z, q, g = (torch.tensor(x, dtype=torch.float32) for x in problem_in_numbers())
    z.requires_grad_()
    (theirs,) = torch.autograd.grad(peer.RotationQuantization.apply(z, q, "rotation", False, 1e-8), z, g)
    z = z.detach()
    ours = dq.vjp(z, q, ROTATION, indices=torch.arange(6))[1](g)[0]
    pushed = dq.jvp(z, q, g, q, ROTATION, indices=torch.arange(6))[1]
    torch.testing.assert_close(theirs, pushed, rtol=1e-4, atol=1e-5)
    assert torch.all(torch.linalg.vector_norm(theirs - ours, dim=1) > 0.1)


def test_agrees_with_vector_quantize_pytorch() -> None:
    """Where no length is near zero and no pair nearly antiparallel."""
    peer = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")
    z, q, g = (torch.tensor(x) for x in problem_in_numbers())
    z.requires_grad_()
    (theirs,) = torch.autograd.grad(peer.rotate_to(z, q), z, g)
    ours = dq.vjp(z.detach(), q, ROTATION, indices=torch.arange(6))[1](g)[0]
    # The peer adds to lengths before dividing by them.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_is_a_rotation_where_the_paper_s_formula_is_noise() -> None:
    """Antiparallel up to rounding: the reflections' w would be the direction of what rounding left."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1000, 8)).astype(np.float32)
    z = (q * np.float32(-1 / 3)).astype(np.float32)
    g = rng.standard_normal((1000, 8)).astype(np.float32)
    g_z, _ = dq.vjp(z, q, ROTATION, indices=np.arange(1000))[1](g)
    s = norm(np, q) / norm(np, z)
    np.testing.assert_allclose(norm(np, g_z), s * norm(np, g), rtol=ROUNDINGS * EPS["float32"])
    z_hat, q_hat = z / norm(np, z), q / norm(np, q)
    middle = z_hat + q_hat
    w = middle / np.maximum(norm(np, middle), 1e-30)
    by_paper = s * (g - 2 * w * total(np, w * g) + 2 * z_hat * total(np, q_hat * g))
    assert np.max(np.abs(norm(np, by_paper) / (s * norm(np, g)) - 1)) > 0.1
