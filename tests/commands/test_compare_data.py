"""Reading images, refusing what is none, and the split into training and held-out patches."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from diveq_core.commands.cli import app
from diveq_core.commands.compare.images import Images, load_images
from diveq_core.commands.compare.patches import Patches
from diveq_core.commands.compare.settings import CompareError


def pixels(height=12, width=9, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_sample_images():
    images, source = load_images(None)
    assert [image.shape for image in images] == [(427, 640, 3)] * 2
    assert all(image.dtype == np.float32 and image.min() >= 0 and image.max() <= 1 for image in images)
    assert source == "china.jpg and flower.jpg of scikit-learn"


def test_rgb_image(tmp_path):
    Image.fromarray(pixels()).save(tmp_path / "a.png")
    (image,), _ = load_images(tmp_path / "a.png")
    np.testing.assert_array_equal(image, (pixels() / 255).astype(np.float32))


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "CMYK", "RGBA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(pixels()).convert(mode).save(path)
    (image,), _ = load_images(path)
    assert image.shape == (12, 9, 3)
    assert 0 <= image.min() < image.max() <= 1


def test_transparency_lies_over_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    (image,), _ = load_images(tmp_path / "a.png")
    np.testing.assert_array_equal(image, np.ones((4, 4, 3), np.float32))


def test_sixteen_bits(tmp_path):
    Image.fromarray(np.array([[0, 65535], [32768, 1]], np.uint16)).save(tmp_path / "a.png")
    (image,), _ = load_images(tmp_path / "a.png")
    np.testing.assert_array_equal(image[:, :, 1], np.array([[0, 1], [32768 / 65535, 1 / 65535]], np.float32))


def test_folder_in_order_of_names(tmp_path):
    for name, height in (("b.png", 6), ("a.jpg", 5), ("c.txt", 4)):
        if name == "c.txt":
            (tmp_path / name).write_text("not read")
        else:
            Image.fromarray(pixels(height)).save(tmp_path / name)
    images, source = load_images(tmp_path)
    assert [image.shape[0] for image in images] == [5, 6]
    assert source == f"2 images of {tmp_path}"


@pytest.mark.parametrize(
    ("shape", "count", "first"),
    [
        ((8, 6), 1, (8, 6, 1)),
        ((8, 6, 1), 1, (8, 6, 1)),
        ((8, 6, 3), 1, (8, 6, 3)),
        ((4, 8, 6), 4, (8, 6, 1)),
        ((4, 8, 6, 1), 4, (8, 6, 1)),
        ((4, 8, 6, 3), 4, (8, 6, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64])
def test_arrays(tmp_path, shape, count, first, dtype):
    values = np.random.default_rng(0).random(shape)
    np.save(tmp_path / "a.npy", (values * 255).astype(np.uint8) if dtype == np.uint8 else values.astype(dtype))
    images, _ = load_images(tmp_path / "a.npy")
    assert len(images) == count
    assert images[0].shape == first
    # Half a step of eight bits, and half a unit in the last place of float16, are below 1/255.
    np.testing.assert_allclose(images[0].ravel(), values.ravel()[: images[0].size], atol=1 / 255)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((8, 8), bool), "must be integers or floating, got dtype bool"),
        (np.zeros(8), r"must have shape .*, got \(8,\)"),
        (np.zeros((2, 8, 8, 5)), r"C = 1 or 3, got \(2, 8, 8, 5\)"),
        (np.zeros((0, 8, 3)), r"got \(0, 8, 3\)"),
        (np.full((8, 8), np.nan), "must be finite, got NaN or infinity"),
        (np.full((8, 8), np.inf), "must be finite, got NaN or infinity"),
        (np.full((8, 8), 256.0), r"must lie in \[0, 1\] or \[0, 16\] or \[0, 255\], got values from 256 to 256"),
        (np.full((8, 8), -1), "got values from -1 to -1"),
        (np.array([None, 1], dtype=object), "a .npy file of numbers"),
    ],
)
def test_bad_arrays(tmp_path, values, message):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(CompareError, match=message):
        load_images(tmp_path / "a.npy")


def test_bad_files(tmp_path):
    (tmp_path / "empty.npy").touch()
    (tmp_path / "text.jpg").write_text("no image")
    Image.fromarray(pixels(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "missing.png": "does not exist",
        "empty.npy": "a .npy file of numbers",
        "text.jpg": "that Pillow can read",
        "cut.png": "that Pillow can read",
        "float.tif": "8 or 16 bits per channel, got .* mode 'F'",
        "folder": "a folder with images .*, got none",
    }.items():
        with pytest.raises(CompareError, match=message):
            load_images(tmp_path / name)


def test_no_pixel_is_both_trained_on_and_held_out():
    """Images whose pixels are their own numbers: every position is visited, and meets no held-out pixel."""
    images, total = [], 12 * 9 + 15 * 10
    numbers = np.arange(1, total + 1, dtype=np.float64) / total
    images = [numbers[: 12 * 9].reshape(12, 9, 1), numbers[12 * 9 :].reshape(15, 10, 1)]
    patches = Patches(Images(images, "numbers"), 2)
    train = set(np.rint(patches.pixels(patches.at(np.arange(patches.positions))) * total).astype(int).ravel())
    held_out = set(np.rint(patches.pixels(patches.held_out) * total).astype(int).ravel())
    assert not train & held_out
    assert len(train) == (12 - 4) * 9 + (15 - 4) * 10
    # Of the odd width of the first image, the last column is in no whole patch.
    assert len(held_out) == 4 * 8 + 4 * 10


def test_patches_are_patches_of_their_image():
    images = [pixels(12, 9, seed=1) / 255, pixels(10, 7, seed=2) / 255]
    patches = Patches(Images(images, "noise"), 3)
    cut = patches.pixels(patches.at(np.arange(patches.positions)))
    windows = [
        image[row : row + 3, column : column + 3].ravel()
        for image, split in zip(images, patches.splits, strict=True)
        for row in range(split - 2)
        for column in range(image.shape[1] - 2)
    ]
    # Standardizing and its inverse round once each.
    np.testing.assert_allclose(cut, np.array(windows), atol=1e-14)


def test_held_out_region_is_put_together_again():
    images = [pixels(12, 9, seed=1) / 255, pixels(16, 6, seed=2) / 255]
    patches = Patches(Images(images, "noise"), 2)
    for i, image in enumerate(images):
        split, width = patches.splits[i], image.shape[1] // 2 * 2
        np.testing.assert_allclose(patches.assemble(patches.held_out, i), image[split:, :width], atol=1e-14)


def test_standardized_by_the_training_region():
    patches = Patches(load_images(None), 4)
    x = patches.sample(np.random.default_rng(0), 20_000)
    # Patches overlap and pixels at the border are in fewer, so the agreement is that of a large sample.
    assert abs(x.mean()) < 0.05
    assert abs(x.std() - 1) < 0.05


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((7, 4, 1)), r"8 x 4 pixels \(--patch 4\), got 7 x 4 in what"),
        (np.zeros((8, 3, 1)), r"8 x 4 pixels \(--patch 4\), got 8 x 3 in what"),
        (np.ones((8, 8, 1)), "some contrast, got a training region of one colour in what"),
    ],
)
def test_too_small_or_uniform(image, message):
    with pytest.raises(CompareError, match=message):
        Patches(Images([image], "what"), 4)


@pytest.mark.parametrize("white", [1, 16, 255])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, np.uint16])
def test_the_smallest_white_that_none_exceeds(tmp_path, white, dtype):
    values = np.random.default_rng(0).integers(0, white + 1, (3, 8, 8)).astype(dtype)
    values[0, 0, 0] = white
    np.save(tmp_path / "a.npy", values)
    images, _ = load_images(tmp_path / "a.npy")
    assert [image.shape for image in images] == [(8, 8, 1)] * 3
    np.testing.assert_array_equal(np.stack(images)[..., 0], (values / white).astype(np.float32))


def test_digits_as_scikit_learn_gives_them(tmp_path):
    """(1797, 8, 8) with values from 0 to 16, in which a patch must fit twice."""
    from sklearn.datasets import load_digits

    digits = load_digits().images
    np.save(tmp_path / "digits.npy", digits)
    images = load_images(tmp_path / "digits.npy")
    assert len(images.images) == 1797
    patches = Patches(images, 4)
    assert patches.held_out.shape == (1797 * 2, 16)
    assert patches.positions == 1797 * 5
    np.testing.assert_allclose(
        np.concatenate([patches.assemble(patches.held_out, i) for i in range(3)])[..., 0],
        np.concatenate(digits[:3, 4:] / 16),
        atol=1e-6,  # numbers of order one, once through float32
    )
    with pytest.raises(CompareError, match=r"two patches high and one wide, 10 x 5 pixels .* got 8 x 8"):
        Patches(images, 5)


def test_what_cannot_be_read_written_or_held_is_one_line(tmp_path) -> None:
    np.savez(tmp_path / "whole.npz", np.ones(3))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npz").read_bytes()[:60])
    np.save(tmp_path / "grey.npy", np.random.default_rng(0).random((40, 40)))
    grey = ["--data", str(tmp_path / "grey.npy"), "--out", str(tmp_path / "x.png")]
    for options, text in (
        (["--data", str(tmp_path / "cut.npy")], "compare: --data must be a .npy file of numbers, got"),
        ([*grey, "--out", "/proc/x.png"], "compare: --out must be a file that can be written, got /proc/x.png"),
        ([*grey, "--batch", str(1 << 40)], "compare: --batch must be an integer below 2^31, got"),
        ([*grey, "--dim", str(1 << 30), "--codewords", "4"], "compare: these sizes do not fit in memory: "),
    ):
        result = CliRunner().invoke(app, ["compare", *options])
        assert result.exit_code == 2
        assert result.stderr.startswith(text)
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
