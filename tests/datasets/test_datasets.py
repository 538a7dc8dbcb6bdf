"""Data sets: small files are made here; the real ones are read if their folder is set."""

import gzip
import hashlib
import io
import math
import os
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pyro_recursive.datasets import (
    Dataset,
    DatasetError,
    dynamic_binarize,
    fixed_binarize,
    image_files,
    load,
)

TRAIN, LABELS, TEST, TEST_LABELS = image_files.FILES["mnist"]
REAL = os.environ.get("PYRO_RECURSIVE_DATA")  # read before the fixture below clears it
Array = npt.NDArray[Any]


@pytest.fixture(autouse=True)
def nothing_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No folder named by the environment, an empty cache, and no network."""
    pooch = pytest.importorskip("pooch")

    def refuse(url: str, **_: Any) -> str:
        raise AssertionError(f"a test asked the network for {url}")

    monkeypatch.delenv("PYRO_RECURSIVE_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr(pooch, "retrieve", refuse)


def idx(array: Array, code: int) -> bytes:
    header = bytes((0, 0, code, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content))


def small_arrays() -> tuple[Array, Array, Array, Array]:
    rng = np.random.default_rng(7)
    train, test = (rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for n in (5, 3))
    return train, np.array([3, 1, 4, 1, 5], "u1"), test, np.array([9, 2, 6], "u1")


def write_small(folder: Path) -> None:
    for file, array in zip(image_files.FILES["mnist"], small_arrays(), strict=True):
        write(folder / file, idx(array, 0x08))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with eight images in place of MNIST, whose checksums are not verified."""
    monkeypatch.setattr(image_files, "CONTENT_MD5", {})
    write_small(tmp_path / "mnist")
    return tmp_path


# Reading a folder


def test_a_folder_comes_back_as_written(small: Path) -> None:
    data = load("mnist", root=small)
    train, labels, test, test_labels = small_arrays()
    assert data.name == "mnist" and data.shape == (28, 28)
    for tensor, array in ((data.train, train), (data.test, test)):
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal((tensor * 255).round().numpy(), array.reshape(-1, 784))
        assert tensor.max() == array.max() / np.float32(255)
    for tensor, array in ((data.train_labels, labels), (data.test_labels, test_labels)):
        assert tensor.dtype == torch.int64
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_the_environment_names_the_folder_and_root_comes_first(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRO_RECURSIVE_DATA", str(small))
    assert len(load("mnist").train) == 5
    with pytest.raises(DatasetError, match="elsewhere"):
        load("mnist", root=tmp_path / "elsewhere")


def test_omniglot_labels_are_big_endian_int32(tmp_path: Path) -> None:
    train, _, test, _ = small_arrays()
    labels, test_labels = np.array([0, 1622, 300, 2, 7], ">i4"), np.array([1, 258, 3], ">i4")
    arrays = (train, labels, test, test_labels)
    codes = (0x08, 0x0C, 0x08, 0x0C)
    for file, array, code in zip(image_files.FILES["omniglot"], arrays, codes, strict=True):
        write(tmp_path / "omniglot" / file, idx(array, code))
    data = load("omniglot", root=tmp_path)
    assert data.train_labels.tolist() == [0, 1622, 300, 2, 7]
    assert data.test_labels.tolist() == [1, 258, 3]


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'cifar'.*digits, mnist, fashion_mnist, omniglot"):
        load("cifar")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "omniglot"])
def test_nothing_anywhere_says_what_to_do(name: str) -> None:
    advice = rf"no such file. Set PYRO_RECURSIVE_DATA .*{name}/.*load\('{name}', download=True\)"
    with pytest.raises(DatasetError, match=advice):
        load(name)


# Damage: what is written in place of a file, and what the error then says. Every message begins
# with the path of the damaged file.

IMAGES = idx(small_arrays()[0], 0x08)
PACKED = gzip.compress(IMAGES)
DAMAGE = {
    "truncated": (TRAIN, PACKED[: len(PACKED) // 2], "the gzip file is truncated. Fetch it"),
    "not gzip": (TRAIN, IMAGES, r"not a sound gzip file \(Not a gzipped file"),
    "bad stream": (
        TRAIN,
        PACKED[:10] + bytes([PACKED[10] | 0x06]) + PACKED[11:],  # block type 3 does not exist
        r"not a sound gzip file \(Error -3",
    ),
    "bad sum": (TRAIN, PACKED[:-8] + bytes(4) + PACKED[-4:], r"sound gzip file \(CRC check"),
    "labels for images": (
        TRAIN,
        gzip.compress(idx(np.zeros(900, "u1"), 0x08)),
        r"header is '00000801.*16 bytes that begin with the magic number 00000803. Check",
    ),
    "images for labels": (
        LABELS,
        PACKED,
        r"header is '00000803.*magic number 00000801 or 00000c01. Check",
    ),
    "empty": (TRAIN, gzip.compress(b""), "header is ''"),
    "half a header": (TRAIN, gzip.compress(IMAGES[:10]), "header is '00000803.*not 16 bytes"),
    "too short": (
        TRAIN,
        gzip.compress(IMAGES[:-1]),
        r"promises 3920 bytes for shape \[5, 28, 28\], but 3919 follow. Fetch",
    ),
    "too long": (TRAIN, gzip.compress(IMAGES + b"\0"), "promises 3920 bytes.*3921 follow"),
    "other size": (
        TRAIN,
        gzip.compress(idx(np.zeros((5, 4, 6), "u1"), 0x08)),
        r"images of \(4, 6\) pixels, not \(28, 28\). Fetch",
    ),
    "other count": (
        TEST,
        PACKED,
        "5 images, but 3 labels in t10k-labels-idx1-ubyte.gz. Take both",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(small: Path, kind: str) -> None:
    file, content, message = DAMAGE[kind]
    path = small / "mnist" / file
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=re.escape(f"{path}: ") + ".*" + message):
        load("mnist", root=small)


@pytest.mark.parametrize("file", image_files.FILES["mnist"])
def test_each_missing_file_is_named(small: Path, file: str) -> None:
    path = small / "mnist" / file
    path.unlink()
    with pytest.raises(DatasetError, match=re.escape(f"{path}: no such file. Set PYRO_RECURSIVE")):
        load("mnist", root=small)


# Checksums


def test_other_images_are_not_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = {
        TRAIN: "6bbc9ace898e44ae57da46a324031adb",
        TEST: "2646ac647ad5339dbf082846283269ea",
    }
    write_small(tmp_path / "mnist")
    for file, md5 in published.items():
        content = gzip.decompress((tmp_path / "mnist" / file).read_bytes())
        message = (
            rf"{file}: the MD5 of the uncomp.* is {hashlib.md5(content).hexdigest()}, not {md5}."
        )
        with pytest.raises(DatasetError, match=message):
            load("mnist", root=tmp_path)
        monkeypatch.delitem(image_files.CONTENT_MD5, f"mnist/{file}")
    assert len(load("mnist", root=tmp_path).train) == 5


def test_sha256sums_is_obeyed(small: Path) -> None:
    path = small / "mnist" / LABELS
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    for line in (f"{right}  mnist/{LABELS}", f"{right} *./mnist/{LABELS}", "\n0  mnist/another.gz"):
        (small / "SHA256SUMS").write_text(line + "\n")
        load("mnist", root=small)
    for line in (f"{'0' * 64}  mnist/{LABELS}", f"{'0' * 64} *./mnist/{LABELS}"):
        (small / "SHA256SUMS").write_text(f"\n{line}\n")
        with pytest.raises(DatasetError, match=rf"{LABELS}: the SHA-256 is {right}, not 0{{64}}."):
            load("mnist", root=small)


# Downloads, with pooch.retrieve replaced


def serve(monkeypatch: pytest.MonkeyPatch, write_file: Any) -> list[tuple[str, str]]:
    """Replace downloads by ``write_file(path)``; return the list of their addresses and hashes."""
    asked: list[tuple[str, str]] = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path) -> str:
        asked.append((url, known_hash))
        path.mkdir(parents=True, exist_ok=True)
        write_file(path / fname)
        return str(path / fname)

    monkeypatch.setattr("pooch.retrieve", retrieve)
    return asked


def write_one(path: Path) -> None:
    arrays = dict(zip(image_files.FILES["mnist"], small_arrays(), strict=True))
    write(path, idx(arrays[path.name], 0x08))


HASHES = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873 d53e105ee54ea40749a09fcbcd1e9432 "
        "9fb629c4189551a2d022fa330f9573f3 ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion_mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d 25c81989df183df01b3e8a0aad5dffbe "
        "bef4ecab320f06d8554ea6380940ec79 bb300cfdad3c16e7a12a480ee83cd310",
    ),
}


@pytest.mark.parametrize("name", HASHES)
def test_a_download_is_checksummed_and_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "CONTENT_MD5", {})
    asked = serve(monkeypatch, write_one)
    assert len(load(name, download=True).train) == 5
    url, hashes = HASHES[name]
    assert asked == [
        (url + file, f"md5:{md5}")
        for file, md5 in zip(image_files.FILES["mnist"], hashes.split(), strict=True)
    ]
    asked.clear()
    assert len(load(name).test) == 3
    assert not asked, "the cache is read without a download"


def test_a_complete_folder_is_not_downloaded_again(small: Path) -> None:
    assert len(load("mnist", root=small, download=True).train) == 5


def test_an_incomplete_folder_gives_way_to_the_download(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small / "mnist" / TEST).unlink()
    asked = serve(monkeypatch, write_one)
    assert len(load("mnist", root=small, download=True).test) == 3
    assert len(asked) == 4 and not (small / "mnist" / TEST).exists()


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("MD5 hash does not match")])
def test_a_failed_download_says_what_to_do(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise error

    serve(monkeypatch, fail)
    with pytest.raises(DatasetError, match=rf"{TRAIN}: the download from https.*{error}.*set PYRO"):
        load("mnist", download=True)


def drawing(top: int, left: int) -> bytes:
    """A 105x105 black and white PNG with 15x15 pixels of ink, which is 4x4 after averaging."""
    image = pytest.importorskip("PIL.Image")
    paper = np.full((105, 105), 255, np.uint8)
    paper[top : top + 15, left : left + 15] = 0
    buffer = io.BytesIO()
    image.fromarray(paper).convert("1").save(buffer, "png")
    return buffer.getvalue()


# Eight drawings of three characters; the order inside the archives is not that of the names.
DRAWINGS = {
    "images_background": {
        "Greek/character02/0002_01.png": (15, 0),
        "Greek/character01/0001_02.png": (0, 15),
        "Greek/character01/0001_01.png": (0, 0),
        "Greek/character02/0002_02.png": (15, 15),
    },
    "images_evaluation": {f"Avesta/character01/0003_0{i}.png": (30, 15 * i) for i in (3, 1, 4, 2)},
}
CHARACTER = {0: 0, 15: 1, 30: 2}  # by the top of the ink


def write_drawings(path: Path, step: int = 1) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, place in list(DRAWINGS[path.stem].items())[::step]:
            file.writestr(f"{path.stem}/{name}", drawing(*place))
        file.writestr(f"{path.stem}/readme.txt", "no drawing")
        file.writestr("__MACOSX/images_background/._0001_01.png", "left by an archiver")


def test_omniglot_is_converted_from_its_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, write_drawings)
    data = load("omniglot", download=True)
    url = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
    assert asked == [
        (f"{url}/images_background.zip", "md5:68d2efa1b9178cc56df9314c21c6e718"),
        (f"{url}/images_evaluation.zip", "md5:6b91aef0f799c5bb55b94e3f2daec811"),
    ]
    assert data.train.shape == (6, 784) and data.test.shape == (2, 784)
    seen = set()
    images = torch.cat([data.train, data.test]).view(-1, 28, 28)
    for image, label in zip(images, torch.cat([data.train_labels, data.test_labels]), strict=True):
        top, left = (int(index) for index in image.nonzero()[0])
        expected = torch.zeros(28, 28, dtype=torch.float32)
        expected[top : top + 4, left : left + 4] = 1
        torch.testing.assert_close(image, expected, rtol=0, atol=0)
        place = (top * 15 // 4, left * 15 // 4)
        assert CHARACTER[place[0]] == int(label)
        seen.add(place)
    assert seen == {place for places in DRAWINGS.values() for place in places.values()}


def test_omniglot_is_split_the_same_each_time_and_converted_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve(monkeypatch, write_drawings)
    first = load("omniglot", download=True)
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "_convert_omniglot", lambda _: pytest.fail("again"))
        assert torch.equal(load("omniglot").train, first.train)
        assert torch.equal(load("omniglot", download=True).train, first.train)
    serve(monkeypatch, lambda path: write_drawings(path, step=-1))
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "another" / name)
    again = load("omniglot", download=True)
    assert torch.equal(again.train, first.train) and torch.equal(again.test, first.test)


def test_a_grey_edge_is_averaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    paper = np.full((105, 105), 255, np.uint8)
    paper[:2, :15] = 0  # two of the four rows that the first row of cells averages
    buffer = io.BytesIO()
    image.fromarray(paper).convert("1").save(buffer, "png")
    with zipfile.ZipFile(tmp_path / "images_background.zip", "w") as file:
        file.writestr("images_background/A/character01/0001_01.png", buffer.getvalue())
    ((character, cells),) = image_files._drawings(tmp_path / "images_background.zip")
    assert character == "images_background/A/character01"
    assert np.abs(cells[0, :4].astype(int) - 127.5).max() <= 1 and cells[1:].max() == 0


# The optional dependencies


@pytest.mark.parametrize("name, module", [("digits", "sklearn.datasets"), ("mnist", "pooch")])
def test_a_missing_extra_is_named(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'pyro_recursive\[data\]'"):
        load(name)


def test_a_folder_needs_no_extra(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pooch", "sklearn.datasets", "PIL.Image"):
        monkeypatch.setitem(sys.modules, module, None)
    assert len(load("mnist", root=small).train) == 5


# The digits


def rows(images: torch.Tensor) -> list[tuple[float, ...]]:
    return [tuple(row) for row in images.tolist()]


def test_the_digits_are_split_without_loss() -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    source, labels = sklearn_datasets.load_digits(return_X_y=True)
    data = load()
    assert data.train.shape == (1437, 64) and data.test.shape == (360, 64)
    assert data.shape == (8, 8) and data.train.dtype == data.test.dtype == torch.float32
    ours = zip(
        rows(torch.cat([data.train, data.test])),
        torch.cat([data.train_labels, data.test_labels]).tolist(),
        strict=True,
    )
    theirs = zip(rows(torch.tensor(source / 16)), labels.tolist(), strict=True)
    assert sorted(ours) == sorted(theirs), "each image once, with its label"
    assert not set(rows(data.train)) & set(rows(data.test))


def test_the_split_of_the_digits_is_pinned() -> None:
    first, second = load("digits"), load("digits")
    assert torch.equal(first.train, second.train) and torch.equal(first.test, second.test)
    assert first.train_labels[:8].tolist() == [4, 9, 5, 8, 5, 3, 3, 9]
    assert first.test_labels[:8].tolist() == [6, 6, 6, 2, 5, 6, 6, 2]
    counts = first.test_labels.bincount().tolist()
    assert counts == [29, 38, 33, 40, 33, 39, 32, 42, 41, 33]


def test_loading_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    load("digits")
    assert torch.equal(torch.get_rng_state(), state)


# The validation rows


def test_validation_is_the_end_of_train(small: Path) -> None:
    data = load("mnist", root=small)
    fold = data.split_validation(2)
    assert torch.equal(torch.cat([fold.train, fold.test]), data.train)
    assert fold.train_labels.tolist() == [3, 1, 4] and fold.test_labels.tolist() == [1, 5]
    assert (fold.name, fold.shape) == ("mnist-validation", (28, 28))


@pytest.mark.parametrize("size", [-1, 0, 5, 6])
def test_validation_leaves_rows_on_both_sides(small: Path, size: int) -> None:
    with pytest.raises(ValueError, match=rf"size={size}, but mnist has 5 training.*from 1 to 4"):
        load("mnist", root=small).split_validation(size)


def test_a_data_set_is_frozen_and_shows_its_shapes(small: Path) -> None:
    data: Dataset = load("mnist", root=small)
    assert repr(data) == "Dataset('mnist', train=[5, 784], test=[3, 784], shape=(28, 28))"
    with pytest.raises(AttributeError):
        data.name = "other"  # type: ignore[misc]


# Binary images

BINARIZE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dynamic": dynamic_binarize,
    "fixed": fixed_binarize,
}


@pytest.mark.parametrize("kind", BINARIZE)
@pytest.mark.parametrize("mean", [0.003, 0.3, 0.5, 0.99])
def test_the_mean_of_the_draws_is_the_intensity(kind: str, mean: float) -> None:
    count = 400_000
    draws = BINARIZE[kind](torch.full((count,), mean))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    error = math.sqrt(mean * (1 - mean) / count)
    assert abs(draws.mean().item() - mean) < 4 * error


@pytest.mark.parametrize("kind", BINARIZE)
def test_neighbours_are_drawn_independently(kind: str) -> None:
    draws = BINARIZE[kind](torch.full((1000, 400), 0.5)) - 0.5
    for product in (draws[1:] * draws[:-1], draws[:, 1:] * draws[:, :-1]):
        assert abs(product.mean().item()) < 4 * 0.25 / math.sqrt(product.numel())


@pytest.mark.parametrize("kind", BINARIZE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0, 4), (3,), (2, 3, 4)])
def test_shape_and_dtype_are_kept(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for value in (0.0, 1.0):
        x = torch.full(shape, value, dtype=dtype)
        draws = BINARIZE[kind](x)
        assert draws.dtype == dtype and torch.equal(draws, x), "0 and 1 are certain"


@pytest.mark.parametrize("kind", BINARIZE)
@pytest.mark.parametrize("bad", [-1e-3, 1.001, 255.0, math.nan, math.inf])
def test_what_is_no_intensity_is_refused(kind: str, bad: float) -> None:
    x = torch.full((3, 4), 0.5)
    x[1, 2] = bad
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got values from .* Scale them"):
        BINARIZE[kind](x)


@pytest.mark.parametrize("kind", BINARIZE)
def test_whole_numbers_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"floating point, got torch.uint8. Divide"):
        BINARIZE[kind](torch.zeros(3, dtype=torch.uint8))


def test_dynamic_draws_are_new_and_resume() -> None:
    x = torch.full((50, 20), 0.5)
    state = torch.get_rng_state()
    first, second = dynamic_binarize(x), dynamic_binarize(x)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(dynamic_binarize(x), first) and torch.equal(dynamic_binarize(x), second)


def test_a_generator_replaces_the_global_one() -> None:
    x, state = torch.full((50, 20), 0.5), torch.get_rng_state()
    draws = [dynamic_binarize(x, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_fixed_draws_depend_on_the_seed_alone() -> None:
    x = torch.rand(50, 20)
    state = torch.get_rng_state()
    first = fixed_binarize(x)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.manual_seed(99)
    assert torch.equal(fixed_binarize(x, seed=0), first)
    assert torch.equal(fixed_binarize(x.T.contiguous().T, seed=0), first), "memory order is no part"
    assert not torch.equal(fixed_binarize(x, seed=1), first)


def test_a_fixed_draw_is_pinned() -> None:
    draws = fixed_binarize(torch.full((16,), 0.5), seed=0)
    assert draws.int().tolist() == [1, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 1, 1, 0]


def test_a_uniform_of_zero_lights_no_black_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    # One draw of sixteen million is 0, and a data set has more black pixels than that.
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    assert fixed_binarize(torch.tensor([0.0, 0.01])).tolist() == [0.0, 1.0]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fixed_draws_are_the_same_on_cuda() -> None:
    x, state = torch.rand(50, 20), torch.cuda.get_rng_state()
    draws = fixed_binarize(x.cuda())
    assert draws.is_cuda and torch.equal(draws.cpu(), fixed_binarize(x))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert dynamic_binarize(x.cuda()).is_cuda


# The real files

real = pytest.mark.skipif(REAL is None, reason="PYRO_RECURSIVE_DATA names no folder")


def real_or_skip(name: str) -> Dataset:
    if not (Path(str(REAL)) / name).is_dir():
        pytest.skip(f"PYRO_RECURSIVE_DATA holds no {name}")
    return load(name, root=REAL)


@real
def test_real_mnist() -> None:
    data = real_or_skip("mnist")
    assert data.train.shape == (60_000, 784) and data.test.shape == (10_000, 784)
    # The published counts of each digit, and the mean and deviation that everyone normalises by.
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.train_labels.bincount().tolist() == counts
    test_counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.test_labels.bincount().tolist() == test_counts
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9], "the original order"
    assert abs(data.train.mean().item() - 0.1307) < 5e-5
    assert abs(data.train.std().item() - 0.3081) < 5e-5
    assert data.train.min() == 0 and data.train.max() == 1
    fold = data.split_validation(400)
    assert len(fold.train) == 59_600 and torch.equal(fold.test, data.train[59_600:])


@real
def test_real_omniglot() -> None:
    data = real_or_skip("omniglot")
    assert data.train.shape == (24_345, 784) and data.test.shape == (8_115, 784)
    labels = torch.cat([data.train_labels, data.test_labels])
    assert labels.bincount().tolist() == [20] * 1623, "twenty drawers of each character"
    assert data.train.min() == 0 and data.train.max() == 1
    assert data.train.mean() < 0.2, "ink is 1, paper 0"


@real
def test_real_fashion_mnist() -> None:
    data = real_or_skip("fashion_mnist")
    assert data.train_labels.bincount().tolist() == [6000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
