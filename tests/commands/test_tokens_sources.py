"""Vectors from files of every kind: the same rows in the same order, from any row on, in the shape that they have."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from diveq_core.commands.tokens.errors import DataError
from diveq_core.commands.tokens.sources import open_data
from diveq_core.commands.tokens.sources.patches import cut
from processes import importable

NEEDED = {"parquet": "pyarrow", "arrow": "pyarrow", "stream": "pyarrow", "zarr": "zarr"}


def vectors(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def save_npy(path, z):
    np.save(path / "z.npy", z)
    return path / "z.npy"


def save_columns_first(path, z):
    np.save(path / "z.npy", np.asfortranarray(z))
    return path / "z.npy"


def save_npz(path, z):
    np.savez(path / "z.npz", z=z)
    return path / "z.npz"


def save_compressed(path, z):
    np.savez_compressed(path / "z.npz", z=z)
    return path / "z.npz"


def save_safetensors(path, z):
    from safetensors.numpy import save_file

    save_file({"z": z}, path / "z.safetensors")
    return path / "z.safetensors"


def save_zarr(path, z):
    import zarr

    chunks = tuple(max(n // 3, 1) for n in z.shape[:-1]) + z.shape[-1:]
    store = zarr.create_array(path / "z.zarr", shape=z.shape, dtype=z.dtype, chunks=chunks)
    store[...] = z
    return path / "z.zarr"


def save_shards(path, z):
    folder = path / "shards"
    folder.mkdir()
    half = len(z) // 2
    np.save(folder / "b.npy", z[half:])
    save_npz(folder, z[:half]).rename(folder / "a.npz")
    (folder / "notes.txt").write_text("not read")
    return folder


def table(z):
    import pyarrow as pa

    rows = z.reshape(-1, z.shape[-1])
    lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    return pa.table({"name": [str(i) for i in range(len(rows))], "z": lists})


def save_parquet(path, z):
    import pyarrow.parquet

    pyarrow.parquet.write_table(table(z), path / "z.parquet", row_group_size=7)
    return path / "z.parquet"


def save_arrow(path, z):
    import pyarrow as pa

    with pa.OSFile(str(path / "z.arrow"), "wb") as file, pa.ipc.new_file(file, table(z).schema) as writer:
        writer.write_table(table(z), max_chunksize=5)
    return path / "z.arrow"


def save_stream(path, z):
    import pyarrow as pa

    with pa.OSFile(str(path / "z.arrow"), "wb") as file, pa.ipc.new_stream(file, table(z).schema) as writer:
        writer.write_table(table(z), max_chunksize=5)
    return path / "z.arrow"


SAVE = {
    "npy": save_npy,
    "columns first": save_columns_first,
    "npz": save_npz,
    "compressed": save_compressed,
    "safetensors": save_safetensors,
    "zarr": save_zarr,
    "shards": save_shards,
    "parquet": save_parquet,
    "arrow": save_arrow,
    "stream": save_stream,
}
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(not importable(NEEDED[kind]), reason=f"needs {NEEDED[kind]}"))
    if kind in NEEDED
    else kind
    for kind in SAVE
]
COLUMNS = ("parquet", "arrow", "stream")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_rows(tmp_path, kind, dtype):
    z = vectors(10, 4, 3, 5, dtype=dtype)
    source = open_data(SAVE[kind](tmp_path, z))
    rows = z.reshape(-1, 5)
    assert source.lead == ((120,) if kind in COLUMNS else (10, 4, 3))
    assert (source.rows, source.dim, source.dtype) == (120, 5, np.dtype(dtype).name)
    for size in (1, 7, 50, 1000):
        for start in (0, 1, 11, 119):
            chunks = list(source.chunks(size, start))
            assert [len(chunk) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
            found = np.concatenate(chunks)
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, rows[start:])


@pytest.mark.parametrize("kind", ["npy", "npz", "compressed", "safetensors"])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (1, 60, 5), (3, 1, 2, 5)])
def test_any_leading_shape(tmp_path, kind, shape):
    z = vectors(*shape)
    source = open_data(SAVE[kind](tmp_path, z))
    assert source.lead == shape[:-1]
    np.testing.assert_array_equal(np.concatenate(list(source.chunks(4))), z.reshape(-1, 5))


def test_bytes_in_the_other_order(tmp_path):
    z = vectors(6, 3)
    np.save(tmp_path / "z.npy", z.astype(">f4"))
    (chunk,) = open_data(tmp_path / "z.npy").chunks(10)
    assert chunk.dtype == np.dtype("=f4")
    np.testing.assert_array_equal(chunk, z)


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_bfloat16_becomes_float32_exactly(tmp_path, kind):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    z = vectors(6, 3).astype(ml_dtypes.bfloat16)
    source = open_data(SAVE[kind](tmp_path, z))
    assert source.dtype == "bfloat16"
    (chunk,) = source.chunks(10)
    assert chunk.dtype == np.float32
    np.testing.assert_array_equal(chunk, z.astype(np.float32))


@pytest.mark.parametrize("kind", ["list", "large list", "tensor", "null"])
@pytest.mark.skipif(not importable("pyarrow"), reason="needs pyarrow")
def test_kinds_of_columns(tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet

    z = vectors(6, 3)
    if kind == "tensor":
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(z)
    else:
        values = [None, *z[1:].tolist()] if kind == "null" else z.tolist()
        column = pa.array(values, (pa.large_list if kind == "large list" else pa.list_)(pa.float32()))
    pyarrow.parquet.write_table(pa.table({"z": column}), tmp_path / "z.parquet")
    (chunk,) = open_data(tmp_path / "z.parquet").chunks(10)
    if kind == "null":
        assert np.isnan(chunk[0]).all()
    np.testing.assert_array_equal(chunk[1:], z[1:])


@pytest.mark.skipif(not importable("pyarrow"), reason="needs pyarrow")
def test_columns_that_are_no_vectors(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / "z.parquet"
    ragged = pa.array([[1.0, 2.0], [3.0]])
    pyarrow.parquet.write_table(pa.table({"a": ragged, "b": ragged, "c": [1.0, 2.0]}), path)
    with pytest.raises(
        DataError, match=r"DATA must hold a column of lists of numbers and no other, or --column .* got a, b in"
    ):
        open_data(path)
    with pytest.raises(DataError, match=r"--column must name a column of lists of numbers .* a, b, got 'c'"):
        open_data(path, "c")
    with pytest.raises(DataError, match=r"DATA must hold vectors of one length, 2 as the first, got 1 in row 1 of"):
        list(open_data(path, "a").chunks(10))


def test_patches_of_a_grey_stack(tmp_path):
    from sklearn.datasets import load_digits

    images = load_digits().images[:9]
    np.save(tmp_path / "digits.npy", images)
    source = open_data(tmp_path / "digits.npy", patch=4)
    assert (source.lead, source.dim) == ((9, 2, 2), 16)
    found = np.concatenate(list(source.chunks(5))).reshape(9, 2, 2, 4, 4)
    np.testing.assert_array_equal(found[3, 1, 0], images[3, 4:, :4])
    # Without patches it is a stack of vectors along the last axis.
    assert open_data(tmp_path / "digits.npy").lead == (9, 8)


def test_patches_of_pixels_in_eight_bits(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    source = open_data(tmp_path / "a.npy", patch=2)
    assert (source.lead, source.dim) == ((2, 4), 12)
    (chunk,) = source.chunks(10)
    np.testing.assert_array_equal(chunk[5].reshape(2, 2, 3), (pixels[2:4, 2:4] / 255).astype(np.float32))
    with pytest.raises(DataError, match=r"DATA must hold float16, .* got uint8 .*; --patch cuts images into vectors"):
        open_data(tmp_path / "a.npy")


def test_images_of_one_size_and_of_several(tmp_path):
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (8, 12, 3), dtype=np.uint8) for _ in range(3)]
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    source = open_data(tmp_path)
    assert (source.lead, source.dim) == ((3, 2, 3), 48)
    expected = np.concatenate([cut((image / 255).astype(np.float32), 4) for image in pixels])
    for start in (0, 5, 6, 17):
        np.testing.assert_array_equal(np.concatenate(list(source.chunks(4, start))), expected[start:])
    assert open_data(tmp_path / "0.png", patch=2).lead == (4, 6)
    # As a camera held upright writes it: turned by a quarter.
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels[0]).save(tmp_path / "3.png", exif=turned)
    source = open_data(tmp_path)
    assert source.lead == (24,)
    assert sum(map(len, source.chunks(5))) == 24
    with pytest.raises(DataError, match=r"--patch must be at most the sides of an image, 8 x 12 in .*0.png, got 9"):
        open_data(tmp_path, patch=9)


def test_an_identity_tells_data_from_other_data(tmp_path):
    z = vectors(8, 4)
    path = save_npy(tmp_path, z)
    before = open_data(path).identity()
    assert open_data(path).identity() == before
    os.utime(path, ns=(1, 1))
    assert open_data(path).identity() != before
    assert open_data(path, patch=2).identity() != open_data(path).identity()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"no array", r"DATA must be a \.npy file of numbers"),
        ("a.npz", b"no archive", r"DATA must be a \.npz file of arrays"),
        ("a.safetensors", b"no tensors", r"DATA must be a whole safetensors file"),
        ("a.png", b"no image", r"DATA must be images that Pillow can read"),
        ("a.csv", b"1,2", r"DATA must be a \.npy, .* file, an image, or a folder"),
        ("a.parquet", b"no table", r"DATA must be a whole Parquet file"),
        ("a.arrow", b"ARROW1 but nothing else", r"DATA must be a whole Arrow file"),
    ],
)
def test_files_that_are_no_data(tmp_path, name, content, message):
    if name in ("a.parquet", "a.arrow"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_data(tmp_path / name)


def test_wrong_arrays(tmp_path):
    def refused(message, path, **options):
        with pytest.raises(DataError, match=message):
            open_data(path, **options)

    np.save(tmp_path / "z.npy", vectors(100, 4))
    whole = (tmp_path / "z.npy").read_bytes()
    (tmp_path / "z.npy").write_bytes(whole[:-8])
    refused(r"DATA must be a whole \.npy file, got .* with 1592 of its 1600 bytes", tmp_path / "z.npy")
    np.save(tmp_path / "i.npy", np.arange(6).reshape(2, 3))
    refused("DATA must hold float16, bfloat16, float32 or float64, got int64", tmp_path / "i.npy")
    np.save(tmp_path / "e.npy", np.zeros((0, 3)))
    refused(r"DATA must hold at least one vector, got shape \(0, 3\)", tmp_path / "e.npy")
    np.save(tmp_path / "o.npy", np.array([None]))
    refused("DATA must hold numbers, got object", tmp_path / "o.npy")
    np.save(tmp_path / "s.npy", np.float32(1))
    refused(r"DATA must have at least one axis, got shape \(\)", tmp_path / "s.npy")
    np.savez(tmp_path / "two.npz", a=vectors(2, 3), b=vectors(2, 4))
    refused(r"DATA must hold an array and no other, or --column say which, got a, b", tmp_path / "two.npz")
    refused(r"--column must name an array of .*, a, b, got 'c'", tmp_path / "two.npz", column="c")
    assert open_data(tmp_path / "two.npz", "b").dim == 4
    refused("--column must be left out where there is one array, got 'a'", tmp_path / "i.npy", column="a")
    refused(r"got .*missing.npy, which does not exist", tmp_path / "missing.npy")
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(r"got the folder .* with none", folder)
    np.save(folder / "a.npy", vectors(2, 3))
    np.save(folder / "b.npy", vectors(2, 4))
    refused(r"DATA must hold vectors of one length, 3 as in a.npy, got 4 in .*b.npy", folder)
    Image.new("RGB", (8, 8)).save(folder / "c.png")
    refused(r"DATA must be a folder of one kind of file, got images \(c.png\) and arrays \(a.npy\)", folder)
    np.save(tmp_path / "five.npy", vectors(2, 2, 2, 2, 3))
    refused(r"DATA must have shape \(H, W\), .* for --patch, got \(2, 2, 2, 2, 3\)", tmp_path / "five.npy", patch=2)


@pytest.mark.parametrize(("name", "module"), [("z.parquet", "pyarrow"), ("z.zarr", "zarr"), ("z.png", "PIL")])
def test_a_package_that_is_not_installed(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    if name == "z.zarr":
        (tmp_path / name).mkdir()
        (tmp_path / name / "zarr.json").write_text("{}")
    else:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r'not installed here: pip install "diveq-core\[data\]"'):
        open_data(tmp_path / name)
