"""Every gradient of the experiment against autograd and finite differences, and Adam against torch's."""

from __future__ import annotations

import numpy as np
import pytest

import diveq_core as dq
from diveq_core.commands.compare.autoencoder import initial_parameters, loss_and_gradients, reconstruct
from diveq_core.commands.compare.layers import affine, perceptron, relu
from diveq_core.commands.compare.losses import codebook_loss, commitment_loss, squared_error
from diveq_core.commands.compare.recipes import DEFAULT, RECIPES
from diveq_core.layers.adam import adam, no_moments
from diveq_core.tokens import lookup, nearest

N, P, WIDTH, D, K = 12, 6, 5, 3, 4
SIZES = {"x": (N, P), "weight": (P, D), "bias": (D,)}

# Both sides compute in float64; sums of at most a few hundred products differ in their order.
ROUNDING = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch's autograd is the reference")


@pytest.fixture
def parameters(rng):
    drawn = initial_parameters(rng, P, WIDTH, D)
    # Biases that are not zero, so that their part in the forward is seen.
    drawn = {name: x + 0.1 * rng.standard_normal(x.shape) for name, x in drawn.items()}
    return drawn | {"codebook": rng.standard_normal((K, D))}


def leaves(torch, *arrays):
    return [torch.tensor(x, requires_grad=True) for x in arrays]


def test_affine_pullback(torch, rng):
    x, weight, bias = (rng.standard_normal(shape) for shape in SIZES.values())
    g = rng.standard_normal((N, D))
    y, pullback = affine(x, weight, bias)
    inputs = leaves(torch, x, weight, bias)
    expected = torch.nn.functional.linear(inputs[0], inputs[1].T, inputs[2])
    np.testing.assert_allclose(y, expected.detach().numpy(), **ROUNDING)
    for hand, auto in zip(pullback(g), torch.autograd.grad(expected, inputs, torch.tensor(g)), strict=True):
        np.testing.assert_allclose(hand, auto.numpy(), **ROUNDING)


def test_relu_pullback(torch, rng):
    x, g = rng.standard_normal((2, N, P))
    x[0, 0] = 0.0
    y, pullback = relu(x)
    (leaf,) = leaves(torch, x)
    expected = torch.relu(leaf)
    np.testing.assert_array_equal(y, expected.detach().numpy())
    np.testing.assert_array_equal(pullback(g), torch.autograd.grad(expected, leaf, torch.tensor(g))[0].numpy())


def test_perceptron_pullback(torch, rng, parameters):
    x, g = rng.standard_normal((N, P)), rng.standard_normal((N, D))
    y, pullback = perceptron(parameters, "encoder", x)
    g_x, gradients = pullback(g)
    names = list(gradients)
    assert names == ["encoder.weight_1", "encoder.bias_1", "encoder.weight_2", "encoder.bias_2"]
    leaf, *own = leaves(torch, x, *(parameters[name] for name in names))
    expected = torch.relu(leaf @ own[0] + own[1]) @ own[2] + own[3]
    np.testing.assert_allclose(y, expected.detach().numpy(), **ROUNDING)
    auto_x, *auto = torch.autograd.grad(expected, [leaf, *own], torch.tensor(g))
    np.testing.assert_allclose(g_x, auto_x.numpy(), **ROUNDING)
    for name, gradient in zip(names, auto, strict=True):
        np.testing.assert_allclose(gradients[name], gradient.numpy(), **ROUNDING, err_msg=name)


def test_losses(torch, rng):
    z, codebook = rng.standard_normal((N, D)), rng.standard_normal((K, D))
    indices = nearest(z, codebook)
    z_leaf, codebook_leaf = leaves(torch, z, codebook)
    q = codebook_leaf[torch.tensor(indices)]
    for (loss, gradient), expected, leaf in (
        (squared_error(z, lookup(indices, codebook)), torch.mean((z_leaf - q.detach()) ** 2), z_leaf),
        (commitment_loss(z, codebook, indices), torch.mean((z_leaf - q.detach()) ** 2), z_leaf),
        (codebook_loss(z, codebook, indices), torch.mean((z_leaf.detach() - q) ** 2), codebook_leaf),
    ):
        np.testing.assert_allclose(loss, expected.item(), **ROUNDING)
        np.testing.assert_allclose(gradient, torch.autograd.grad(expected, leaf)[0].numpy(), **ROUNDING)


def torch_output(torch, name, z, q, noise):
    """The estimators as stop-gradient expressions, read off the papers."""
    d = q - z
    rho = torch.linalg.vector_norm(d, dim=-1, keepdim=True)

    def unit(x):
        return (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)).detach()

    def radial(alpha):
        return z + rho**alpha * (d / rho**alpha).detach()

    return {
        "unquantized": lambda: z,
        "vq-vae": lambda: z + d.detach(),
        "ste": lambda: z + d.detach(),
        "nsvq": lambda: z + rho * unit(noise),
        "diveq": lambda: z + rho * unit(d + 10**-1.5 * noise),
        "diveq-detach": lambda: radial(1.0),
        "radial-0.5": lambda: radial(0.5),
        "radial-2": lambda: radial(2.0),
    }[name]()


@pytest.mark.parametrize("name", DEFAULT)
def test_whole_step(torch, rng, parameters, name):
    recipe = RECIPES[name]
    if recipe.quantizer is None:
        del parameters["codebook"]
    x, noise = rng.standard_normal((N, P)), rng.standard_normal((N, D))
    loss, gradients, *_ = loss_and_gradients(parameters, x, {"normal": noise}, recipe)

    own = dict(zip(parameters, leaves(torch, *parameters.values()), strict=True))

    def layers(part, h):
        h = torch.relu(h @ own[f"{part}.weight_1"] + own[f"{part}.bias_1"])
        return h @ own[f"{part}.weight_2"] + own[f"{part}.bias_2"]

    z = layers("encoder", torch.tensor(x))
    auxiliary = q = torch.zeros(())
    if recipe.quantizer is not None:
        q = own["codebook"][torch.cdist(z, own["codebook"]).argmin(dim=1)]
        auxiliary = recipe.codebook_weight * torch.mean((q - z.detach()) ** 2)
        auxiliary = auxiliary + recipe.commitment_weight * torch.mean((z - q.detach()) ** 2)
    y = layers("decoder", torch_output(torch, name, z, q, torch.tensor(noise)))
    expected = torch.mean((y - torch.tensor(x)) ** 2)
    auto = torch.autograd.grad(expected + auxiliary, list(own.values()), allow_unused=True)

    np.testing.assert_allclose(loss, expected.item(), **ROUNDING)
    assert gradients.keys() == parameters.keys()
    for key, gradient in zip(own, auto, strict=True):
        known = np.zeros(own[key].shape) if gradient is None else gradient.numpy()
        np.testing.assert_allclose(gradients[key], known, **ROUNDING, err_msg=key)
    # Only straight-through without losses leaves the codebook as it is.
    assert name == "unquantized" or np.any(gradients["codebook"]) == (name != "ste")


def torch_quantized(torch, name, quantizer, own, z, noise):
    """The other quantizers by the library's own verbs under torch's autograd, and the losses beside."""
    auxiliary = torch.zeros(())
    if name == "fsq":
        few = z @ own["fsq.weight_in"] + own["fsq.bias_in"]
        return dq.quantize(few, None, dq.FSQ(quantizer.levels)).z_q @ own["fsq.weight_out"] + own[
            "fsq.bias_out"
        ], auxiliary
    if name == "gumbel":
        words = own["codebook"]
        logits = -torch.exp(own["gumbel.log_scale"]) * torch.sum((z[:, None] - words) ** 2, dim=2)
        return dq.quantize(logits, words, quantizer.gumbel, noise=noise["gumbel"]).z_q, auxiliary
    codebook = dq.linear_codebook((own["frozen"].detach(), own["weight"])) if name == "linear" else own["codebook"]
    estimator, drawn = quantizer.estimator, noise.get("normal")
    if name in ("residual", "product"):
        estimator = dq.Residual(estimator, 2) if name == "residual" else dq.Product(estimator, 2)
    if name.startswith("sf-"):
        drawn = dq.CurveNoise(noise["dither"], noise.get("ends"))
    out = dq.quantize(z, codebook.detach() if name == "ema" else codebook, estimator, noise=drawn)
    recipe = RECIPES[name]
    if recipe.commitment_weight:
        q = codebook[out.indices]
        auxiliary = recipe.commitment_weight * torch.mean((z - q.detach()) ** 2)
        auxiliary = auxiliary + recipe.codebook_weight * torch.mean((q - z.detach()) ** 2)
    return out.z_q, auxiliary


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in DEFAULT])
def test_whole_step_of_other_quantizers(torch, rng, name):
    dim = 4
    recipe = RECIPES[name].sized(9, dim)
    parameters = initial_parameters(rng, P, WIDTH, dim) | recipe.quantizer.start(rng.standard_normal((9, dim)))
    x, noise = rng.standard_normal((N, P)), recipe.quantizer.draw(rng, N, 9, dim)
    out = loss_and_gradients(parameters, x, noise, recipe)

    own = dict(zip(parameters, leaves(torch, *parameters.values()), strict=True))

    def layers(part, h):
        h = torch.relu(h @ own[f"{part}.weight_1"] + own[f"{part}.bias_1"])
        return h @ own[f"{part}.weight_2"] + own[f"{part}.bias_2"]

    z = layers("encoder", torch.tensor(x))
    drawn = {key: torch.tensor(value) for key, value in noise.items()}
    z_q, auxiliary = torch_quantized(torch, name, recipe.quantizer, own, z, drawn)
    expected = torch.mean((layers("decoder", z_q) - torch.tensor(x)) ** 2)
    auto = torch.autograd.grad(expected + auxiliary, list(own.values()), allow_unused=True)

    np.testing.assert_allclose(out.loss, expected.item(), **ROUNDING)
    for key, gradient in zip(own, auto, strict=True):
        if gradient is None or (name == "ema" and key == "codebook"):
            assert key not in out.gradients or not np.any(out.gradients[key])
        else:
            np.testing.assert_allclose(out.gradients[key], gradient.numpy(), **ROUNDING, err_msg=key)


@pytest.mark.parametrize("name", ["residual", "product"])
def test_composed_codes_are_hard(rng, name):
    """What evaluation decodes is the composite's codewords, without the noise of training."""
    quantizer = RECIPES[name].sized(9, 4).quantizer
    parameters, z = quantizer.start(rng.standard_normal((9, 4))), rng.standard_normal((N, 4))
    q, codes = quantizer.hard(parameters, z)
    indices = np.stack(np.divmod(codes, 3), axis=1)
    composite = quantizer.composite(dq.STE())
    np.testing.assert_array_equal(q, dq.decode(indices, parameters["codebook"], composite))
    np.testing.assert_array_equal(indices, dq.quantize(z, parameters["codebook"], composite).indices)


def test_unquantized_step_by_finite_differences(rng, parameters):
    del parameters["codebook"]
    recipe, x, h = RECIPES["unquantized"], rng.standard_normal((N, P)), 1e-6
    _, gradients, *_ = loss_and_gradients(parameters, x, {}, recipe)
    for name, value in parameters.items():
        direction = rng.standard_normal(value.shape)

        def moved(by, name=name, value=value, direction=direction):
            return loss_and_gradients(parameters | {name: value + by * direction}, x, {}, recipe).loss

        # A central difference of step 1e-6 errs by 1e-12 in theory and 1e-10 by rounding.
        np.testing.assert_allclose(
            np.sum(gradients[name] * direction), (moved(h) - moved(-h)) / (2 * h), rtol=1e-6, atol=1e-8, err_msg=name
        )


def test_reconstruction_goes_through_the_hard_codewords(rng, parameters):
    x = rng.standard_normal((N, P))
    out = reconstruct(parameters, x, RECIPES["nsvq"])
    np.testing.assert_array_equal(out.codes, nearest(out.z, parameters["codebook"]))
    np.testing.assert_array_equal(out.q, lookup(out.codes, parameters["codebook"]))
    np.testing.assert_array_equal(out.y, perceptron(parameters, "decoder", out.q)[0])


def test_adam_is_torchs(torch, rng):
    parameters = {"a": rng.standard_normal((3, 2)), "b": rng.standard_normal(4)}
    own = leaves(torch, *parameters.values())
    optimizer, moments = torch.optim.Adam(own, lr=0.03), no_moments(parameters)
    for _ in range(5):
        gradients = {name: rng.standard_normal(x.shape) for name, x in parameters.items()}
        for leaf, g in zip(own, gradients.values(), strict=True):
            leaf.grad = torch.tensor(g)
        optimizer.step()
        parameters, moments = adam(parameters, gradients, moments, 0.03)
        for leaf, x in zip(own, parameters.values(), strict=True):
            np.testing.assert_allclose(x, leaf.detach().numpy(), **ROUNDING)
