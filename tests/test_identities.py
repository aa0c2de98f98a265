"""The identities of the mathematics, by their names: what must hold whatever the numbers are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import diveq_core as dq
from libraries import Library, library_named
from reference import CASES, Case, case_named, expected, matrix
from strategies import EPS, ROUNDINGS, Problem, brute_force, example_count, problems

# Those that NumPy can serve; other libraries are held to NumPy's numbers elsewhere.
EVERYWHERE = [case for case in CASES if not case.differentiating_only]
OF_DIFFERENCE = [case for case in EVERYWHERE if case.of_difference]
DISTANCES = [case for case in OF_DIFFERENCE if case.rotates and not case.name.startswith("PNorm")]


def answers(p: Problem, estimator: dq.Estimator, indices: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """All that NumPy's verbs give, in float64."""
    options = {"noise": p.noise, "indices": p.indices if indices is None else indices}
    out, pullback = dq.vjp(p.z, p.codebook, estimator, **options)
    g_z, g_codebook = pullback(p.g)
    _, tangent = dq.jvp(p.z, p.codebook, p.dz, p.dcodebook, estimator, **options)
    return {"z_q": out.z_q, "g_z": g_z, "g_codebook": g_codebook, "tangent": tangent}


def own_codewords(p: Problem) -> Problem:
    """The same rows, each with a codeword of its own: then the codebook's cotangent is g_q."""
    rows = {name: getattr(p, name).reshape(-1, p.width) for name in ("z", "noise", "g", "dz")}
    indices = np.arange(p.indices.size)
    return Problem(codebook=p.q.reshape(-1, p.width), indices=indices, dcodebook=rows["dz"], **rows)


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray], sizes: dict[str, np.ndarray]) -> None:
    for name, value in a.items():
        assert np.all(np.abs(value - b[name]) <= ROUNDINGS * EPS["float64"] * sizes[name]), name


def assert_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)


@pytest.mark.parametrize("case", OF_DIFFERENCE, ids=repr)
@given(p=problems())
def test_cotangents_add_up_to_g(library: Library, case: Case, p: Problem) -> None:
    """g_z + g_q = g, for every radius of q - z alone: one rounding of a difference and of a sum."""
    p = own_codewords(p).rounded("float32")
    a = {k: library.to(getattr(p, k).astype(np.float32)) for k in ("z", "codebook", "noise", "g")}
    _, pullback = dq.vjp(a["z"], a["codebook"], case.make(p.width), noise=a["noise"], indices=library.to(p.indices))
    g_z, g_q = (library.back(x).astype(np.float64) for x in pullback(a["g"]))
    tolerance = EPS["float32"] * (np.abs(p.g) + np.abs(g_z) + np.abs(g_q))
    assert np.all(np.abs(g_z + g_q - p.g) <= tolerance)


@given(p=problems())
def test_straight_through_is_the_power_zero(library: Library, p: Problem) -> None:
    """Bit for bit, up to the sign of a zero."""
    a = {k: library.to(v.astype(np.float32)) for k, v in vars(p).items() if k != "indices"}
    options = {"indices": library.to(p.indices)}
    results = []
    for estimator in (dq.STE(), dq.Radial(dq.Power(0.0))):
        out, pullback = dq.vjp(a["z"], a["codebook"], estimator, **options)
        _, tangent = dq.jvp(a["z"], a["codebook"], a["dz"], a["dcodebook"], estimator, **options)
        results.append([library.back(x) for x in (out.z_q, *pullback(a["g"]), tangent)])
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(results[0][1], library.back(a["g"]))
    np.testing.assert_array_equal(results[0][2], 0)


@given(p=problems())
def test_sigma_zero_is_detach_and_its_limit(p: Problem) -> None:
    want = answers(p, dq.DiVeQDetach())
    assert_bits(answers(p, dq.DiVeQ(0.0)), want)
    # The direction moves by sigma |eps| / rho; rows that sit on their codeword have none.
    near = answers(p, dq.DiVeQ(1e-12))
    rho = np.linalg.norm(p.q - p.z, axis=-1, keepdims=True)
    moved = 1e-12 * np.linalg.norm(p.noise, axis=-1, keepdims=True) / np.where(rho == 0, 1, rho)
    sizes = expected(case_named("DiVeQDetach"), p).sizes
    for name in ("z_q", "g_z", "tangent"):
        tolerance = (2 * moved + ROUNDINGS * EPS["float64"]) * np.sum(sizes[name], axis=-1, keepdims=True)
        assert np.all(np.abs(near[name] - want[name]) <= tolerance), name


@given(p=problems())
def test_large_sigma_is_noise_substitution(p: Problem) -> None:
    far, want = answers(p, dq.DiVeQ(1e12)), answers(p, dq.NSVQ())
    rho = np.linalg.norm(p.q - p.z, axis=-1, keepdims=True)
    moved = 1e-12 * rho / np.linalg.norm(p.noise, axis=-1, keepdims=True)
    sizes = expected(case_named("NSVQ"), p).sizes
    for name in ("z_q", "g_z", "tangent"):
        tolerance = (2 * moved + ROUNDINGS * EPS["float64"]) * np.sum(sizes[name], axis=-1, keepdims=True)
        assert np.all(np.abs(far[name] - want[name]) <= tolerance), name


@pytest.mark.parametrize("case", [*OF_DIFFERENCE, case_named("Cosine")], ids=repr)
@given(p=problems(), shift=st.integers(-8, 8))
def test_translation(case: Case, p: Problem, shift: int) -> None:
    """On a grid that holds both places exactly the error is the same number, so the gradients are, bit for bit."""
    grid = {name: np.round(getattr(p, name) * 2**10) / 2**10 for name in ("z", "codebook")}
    p = Problem(**{**vars(p), **grid})
    moved = Problem(**{**vars(p), "z": p.z + shift, "codebook": p.codebook + shift})
    here, there = answers(p, case.make(p.width)), answers(moved, case.make(p.width))
    if case.name == "Cosine":
        # An angle seen from elsewhere is another one, except where there is no angle to see.
        if shift and p.width > 1 and np.any(here["g_codebook"] != 0):
            assert np.any(here["g_z"] != there["g_z"])
        return
    for name in ("g_z", "g_codebook", "tangent"):
        np.testing.assert_array_equal(here[name], there[name])
    size = np.abs(moved.z) + np.abs(moved.q) + expected(case, p).sizes["z_q"]
    assert np.all(np.abs(there["z_q"] - shift - here["z_q"]) <= ROUNDINGS * EPS["float64"] * size)


@pytest.mark.parametrize("case", [*DISTANCES, case_named("Cosine")], ids=repr)
@given(p=problems(lost=False), seed=st.integers(0, 2**32 - 1))
def test_rotation(case: Case, p: Problem, seed: int) -> None:
    """Everything turns with the vectors."""
    turn, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((p.width, p.width)))
    turned = Problem(**{k: v if k == "indices" else v @ turn for k, v in vars(p).items()})
    here, there = answers(p, case.make(p.width)), answers(turned, case.make(p.width))
    sizes = [expected(case, each).sizes for each in (p, turned)]
    for name, value in here.items():
        # Coordinates mix, so every one is as uncertain as its row; the rotation itself adds two sums of D products.
        size = sum(np.sum(each[name], axis=-1, keepdims=True) for each in sizes)
        assert np.all(np.abs(value @ turn - there[name]) <= ROUNDINGS * EPS["float64"] * size), name


@given(p=problems(lost=False), seed=st.integers(0, 2**32 - 1))
def test_rotation_of_the_metric(p: Problem, seed: int) -> None:
    """Mahalanobis turns if its matrix does."""
    turn, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((p.width, p.width)))
    turned = Problem(**{k: v if k == "indices" else v @ turn for k, v in vars(p).items()})
    m, case = matrix(p.width), case_named("Mahalanobis")
    here = answers(p, dq.Radial(dq.Mahalanobis(m)))
    there = answers(turned, dq.Radial(dq.Mahalanobis(turn.T @ m @ turn)))
    sizes = expected(case, p).sizes
    for name, value in here.items():
        size = np.sum(sizes[name], axis=-1, keepdims=True)
        # The turned matrix is rounded too, at most its condition number of 2 times as much.
        assert np.all(np.abs(value @ turn - there[name]) <= 4 * ROUNDINGS * EPS["float64"] * size), name


@pytest.mark.parametrize("case", EVERYWHERE, ids=repr)
@given(p=problems(), seed=st.integers(0, 2**32 - 1))
def test_permutation_of_codewords(case: Case, p: Problem, seed: int) -> None:
    """Names of codewords mean nothing: outputs and g_z stay, g_codebook is permuted, bit for bit."""
    count = p.codebook.shape[0]
    order = np.random.default_rng(seed).permutation(count)
    places = np.argsort(order)
    permuted = Problem(**{**vars(p), "codebook": p.codebook[order], "dcodebook": p.dcodebook[order]})
    here = answers(p, case.make(p.width))
    there = answers(permuted, case.make(p.width), indices=places[p.indices])
    here["g_codebook"] = here["g_codebook"][order]
    assert_bits(there, here)


@pytest.mark.parametrize("case", EVERYWHERE, ids=repr)
@given(p=problems(), power=st.sampled_from([-300, -40, -1, 1, 41, 300]))
def test_scaling_by_a_power_of_two_is_exact(case: Case, p: Problem, power: int) -> None:
    """Vectors, sigma and delta scaled alike: outputs scale, gradients stay, bit for bit."""
    if not case.of_difference and case.name != "Cosine":
        pytest.skip("this radius of one's own holds a constant")
    scale, estimator = 2.0**power, case.make(p.width)
    scaled_estimator = estimator
    if isinstance(estimator, dq.DiVeQ):
        scaled_estimator = dq.DiVeQ(estimator.sigma * scale)
    elif case.name == "PseudoHuber":
        scaled_estimator = dq.Radial(dq.PseudoHuber(estimator.radius.delta * scale))
    here, there = answers(p, estimator), answers(p.scaled(scale), scaled_estimator)
    for name in ("z_q", "tangent"):
        here[name] = here[name] * scale
    assert_bits(there, here)


@pytest.mark.parametrize("name", ["array_api_strict", "torch", "mlx", "jax"])
@pytest.mark.parametrize("case", [case_named(n) for n in ("DiVeQ(2)", "Power(1)", "PNorm(3)", "Cosine")], ids=repr)
@settings(max_examples=example_count(0.2))
@given(p=problems(), power=st.sampled_from([-30, 20, 50]))
def test_scaling_by_a_power_of_two_is_exact_elsewhere(name: str, case: Case, p: Problem, power: int) -> None:
    """In float32; a library rounds the same operations alike, whatever the exponent."""
    library, scale, estimator = library_named(name), 2.0**power, case.make(p.width)
    p = p.rounded("float32")
    results = []
    for q, e in ((p, estimator), (p.scaled(scale), dq.DiVeQ(2.0 * scale) if case.sigma else estimator)):
        a = {k: library.to(v.astype(np.float32)) for k, v in vars(q).items() if k != "indices"}
        out, pullback = dq.vjp(a["z"], a["codebook"], e, noise=a["noise"], indices=library.to(p.indices))
        results.append([library.back(x) for x in (out.z_q, *pullback(a["g"]))])
    results[0][0] = results[0][0] * np.float32(scale)
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x, y)


@given(p=problems())
def test_the_choice_is_the_nearest_codeword_and_carries_no_gradient(p: Problem) -> None:
    """Verbs without ``indices`` are verbs with the nearest."""
    found = dq.nearest(p.z, p.codebook)
    d = [np.sum((p.z - p.codebook[i]) ** 2, axis=-1) for i in (found, brute_force(p.z, p.codebook))]
    np.testing.assert_allclose(d[0], d[1], rtol=0, atol=ROUNDINGS * EPS["float64"] * (1 + np.max(d[1])))
    out, pullback = dq.vjp(p.z, p.codebook, dq.DiVeQ(), noise=p.noise)
    want, same = dq.vjp(p.z, p.codebook, dq.DiVeQ(), noise=p.noise, indices=found)
    np.testing.assert_array_equal(out.indices, found)
    np.testing.assert_array_equal(out.z_q, want.z_q)
    for a, b in zip(pullback(p.g), same(p.g), strict=True):
        np.testing.assert_array_equal(a, b)


def test_repeated_indices_add_up(library: Library) -> None:
    """A codeword chosen by all vectors gets the sum of their cotangents, one chosen by none gets zero."""
    n = 257
    z = np.ones((n, 2), np.float32)
    codebook = np.array([[9.0, 9.0], [2.0, 1.0]], np.float32)
    g = np.ones((n, 2), np.float32)
    _, pullback = dq.vjp(
        library.to(z), library.to(codebook), dq.DiVeQDetach(), indices=library.to(np.ones(n, np.int32))
    )
    g_z, g_codebook = (library.back(x) for x in pullback(library.to(g)))
    # u = (1, 0) exactly, and small whole numbers are exact in float32.
    np.testing.assert_array_equal(g_codebook, np.array([[0.0, 0.0], [n, 0.0]], np.float32))
    np.testing.assert_array_equal(g_z, np.tile(np.array([0.0, 1.0], np.float32), (n, 1)))


def test_repeated_indices_add_up_across_chunks(library: Library) -> None:
    """A codebook so large that the standard's segment sum takes a few vectors at a time."""
    n, count = 13, 1 << 18
    z, codebook = np.zeros((n, 1), np.float32), np.ones((count, 1), np.float32)
    g = np.arange(1, n + 1, dtype=np.float32)[:, None]
    indices = np.where(np.arange(n) % 3 == 0, 7, count - 1).astype(np.int32)
    options = {"indices": library.to(indices)}
    _, pullback = dq.vjp(library.to(z), library.to(codebook), dq.DiVeQDetach(), **options)
    got = library.back(pullback(library.to(g))[1])[:, 0]
    # u = 1, and small whole numbers are exact in float32.
    assert got[7] == np.sum(g[indices == 7])
    assert got[-1] == np.sum(g[indices != 7])
    assert np.count_nonzero(got) == 2


@pytest.mark.parametrize("case", [c for c in EVERYWHERE if c.hard and c.name != "STE"], ids=repr)
@given(p=problems())
def test_radial_is_straight_through_plus_the_auxiliary_loss(case: Case, p: Problem) -> None:
    """g_z - g and g_q are the gradients of ``sg[<g, q - z>] ln r``."""
    torch = pytest.importorskip("torch")
    got = answers(p, case.make(p.width))
    z, codebook = (torch.tensor(x).requires_grad_() for x in (p.z, p.codebook))
    q = codebook[torch.tensor(p.indices)]
    lost = case.lost(torch, q, z).detach()
    one = torch.ones_like(z)
    r = case.length(torch, torch.where(lost, -one, q), torch.where(lost, one, z))
    weight = (torch.tensor(p.g) * (q - z)).sum(-1, keepdim=True).detach()
    auxiliary = torch.where(lost, torch.zeros_like(r), weight * torch.log(r)).sum()
    auxiliary = auxiliary + 0 * (z.sum() + codebook.sum())
    to_z, to_codebook = torch.autograd.grad(auxiliary, (z, codebook))
    sizes = expected(case, p).sizes
    bound = ROUNDINGS * EPS["float64"]
    assert np.all(np.abs(p.g + to_z.numpy() - got["g_z"]) <= bound * sizes["g_z"])
    assert np.all(np.abs(to_codebook.numpy() - got["g_codebook"]) <= bound * sizes["g_codebook"])
