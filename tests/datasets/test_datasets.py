"""Data sets: small files are made here; the real ones are read if their folder is set."""

import gzip
import io
import math
import os
import re
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from pyro_recursive.datasets import (
    Dataset,
    DatasetError,
    dynamic_binarize,
    fixed_binarize,
    image_files,
    load,
)

FILES = TRAIN, LABELS, TEST, TEST_LABELS = image_files.FILES["mnist"]
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


def idx(array: Array, code: int = 0x08) -> bytes:
    header = bytes((0, 0, code, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content))


def small_arrays() -> tuple[Array, Array, Array, Array]:
    rng = np.random.default_rng(7)
    train, test = (rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for n in (5, 3))
    return train, np.array([3, 1, 4, 1, 5], "u1"), test, np.array([9, 2, 6], "u1")


def write_one(path: Path) -> None:
    write(path, idx(dict(zip(FILES, small_arrays(), strict=True))[path.name]))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A root with eight images in place of MNIST."""
    for file in FILES:
        write_one(tmp_path / "mnist" / file)
    return tmp_path


# Reading a folder


def test_a_folder_comes_back_as_written(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pooch", "sklearn.datasets", "PIL.Image"):  # a folder needs no extra
        monkeypatch.setitem(sys.modules, module, None)
    data = load("mnist", root=small)
    train, labels, test, test_labels = small_arrays()
    assert repr(data) == "Dataset('mnist', train=[5, 784], test=[3, 784], shape=(28, 28))"
    for tensor, array in ((data.train, train), (data.test, test)):
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal((tensor * 255).round().numpy(), array.reshape(-1, 784))
        assert tensor.max() == array.max() / np.float32(255)
    for tensor, array in ((data.train_labels, labels), (data.test_labels, test_labels)):
        assert tensor.dtype == torch.int64
        np.testing.assert_array_equal(tensor.numpy(), array)
    monkeypatch.setenv("PYRO_RECURSIVE_DATA", str(small))
    assert torch.equal(load("mnist").train, data.train)
    with pytest.raises(DatasetError, match="elsewhere"):  # root comes first
        load("mnist", root=small / "elsewhere")


def test_omniglot_labels_are_big_endian_int32(tmp_path: Path) -> None:
    train, _, test, _ = small_arrays()
    labels, test_labels = np.array([0, 1622, 300, 2, 7], ">i4"), np.array([1, 258, 3], ">i4")
    contents = idx(train), idx(labels, 0x0C), idx(test), idx(test_labels, 0x0C)
    for file, content in zip(image_files.FILES["omniglot"], contents, strict=True):
        write(tmp_path / "omniglot" / file, content)
    data = load("omniglot", root=tmp_path)
    assert data.train_labels.tolist() == [0, 1622, 300, 2, 7]
    assert data.test_labels.tolist() == [1, 258, 3]


def test_what_cannot_be_loaded_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'cifar'.*digits, mnist, fashion_mnist, omniglot"):
        load("cifar")
    for name in ("mnist", "fashion_mnist", "omniglot"):
        advice = rf"no such file. Set PYRO_RECURSIVE_DATA .*{name}/.*load\('{name}', download=True"
        with pytest.raises(DatasetError, match=advice):
            load(name)
    for name, module in (("digits", "sklearn.datasets"), ("mnist", "pooch")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=r"pip install 'pyro_recursive\[data\]'"):
            load(name)


# What is written in place of a file, and what the error then says after the file's path.

IMAGES = idx(small_arrays()[0])
PACKED = gzip.compress(IMAGES)
BAD_BLOCK = PACKED[:10] + bytes([PACKED[10] | 0x06]) + PACKED[11:]  # block type 3 does not exist
DAMAGE: dict[str, tuple[str, bytes | None, str]] = {
    "truncated": (TRAIN, PACKED[: len(PACKED) // 2], r"not a sound gzip file .*Fetch it again"),
    "not gzip": (TRAIN, IMAGES, r"not a sound gzip file \(Not a gzipped file"),
    "bad stream": (TRAIN, BAD_BLOCK, r"not a sound gzip file \(Error -3"),
    "bad sum": (TRAIN, PACKED[:-8] + bytes(4) + PACKED[-4:], r"sound gzip file \(CRC check"),
    "labels for images": (TRAIN, gzip.compress(idx(np.zeros(900, "u1"))),
                          "header is '00000801.*must begin with 00000803"),
    "images for labels": (LABELS, PACKED, "'00000803.*begin with 00000801 or 00000c01"),
    "half a header": (TRAIN, gzip.compress(IMAGES[:10]), "header is '00000803"),
    "too short": (TRAIN, gzip.compress(IMAGES[:-1]), "promises 3920 bytes, but 3919 follow"),
    "too long": (TRAIN, gzip.compress(IMAGES + b"\0"), "promises 3920 bytes, but 3921 follow"),
    "other size": (TRAIN, gzip.compress(idx(np.zeros((5, 4, 6), "u1"))),
                   r"images of \(4, 6\) pixels, not \(28, 28\)"),
    "other count": (TEST, PACKED, "5 images, but 3 labels"),
    **{f"missing {file}": (file, None, "no such file. Set PYRO_RECURSIVE") for file in FILES},
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(small: Path, kind: str) -> None:
    file, content, message = DAMAGE[kind]
    path = small / "mnist" / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=re.escape(f"{path}: ") + ".*" + message):
        load("mnist", root=small)


def test_what_a_file_unpacks_to_is_bounded(small: Path) -> None:
    """A small file whose header promises 3 GB, and one that goes on after what it promises."""
    path = small / "mnist" / TRAIN
    header = bytes.fromhex("00000803") + np.array([2_000_000, 40, 40], ">u4").tobytes()
    path.write_bytes(gzip.compress(header))
    with pytest.raises(DatasetError, match="promises 3200000000 bytes, over 1073741824"):
        load("mnist", root=small)
    path.write_bytes(gzip.compress(IMAGES + bytes(100_000_000)))  # 97 kB
    tracemalloc.start()
    with pytest.raises(DatasetError, match="promises 3920 bytes, but 3921 follow"):
        load("mnist", root=small)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


# Downloads, with pooch.retrieve replaced


def serve(monkeypatch: pytest.MonkeyPatch, write_file: Any) -> list[str]:
    """Replace downloads by ``write_file(path)``; return the list of their addresses."""
    asked: list[str] = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path) -> str:
        assert re.fullmatch("sha256:[0-9a-f]{64}", known_hash) and url.startswith("https:")
        asked.append(url)
        path.mkdir(parents=True, exist_ok=True)
        write_file(path / fname)
        return str(path / fname)

    monkeypatch.setattr("pooch.retrieve", retrieve)
    return asked


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_a_download_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, write_one)
    assert len(load(name, download=True).train) == 5
    assert [url.rpartition("/")[2] for url in asked] == list(FILES)
    assert len(load(name).test) == 3
    assert len(asked) == 4, "the cache is read without a download"


def test_only_an_incomplete_folder_gives_way_to_the_download(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(load("mnist", root=small, download=True).train) == 5
    (small / "mnist" / TEST).unlink()
    asked = serve(monkeypatch, write_one)
    assert len(load("mnist", root=small, download=True).test) == 3
    assert len(asked) == 4 and not (small / "mnist" / TEST).exists()


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("MD5 hash does not match")])
def test_a_failed_download_says_what_to_do(error: Exception, monkeypatch: Any) -> None:
    def fail(path: Path) -> None:
        raise error

    serve(monkeypatch, fail)
    with pytest.raises(DatasetError, match=rf"{TRAIN}: the download from https.*{error}.*set PYRO"):
        load("mnist", download=True)


def drawing(ink: tuple[slice, slice]) -> bytes:
    """A 105x105 black and white PNG; 15x15 pixels of ink are 4x4 after averaging."""
    image = pytest.importorskip("PIL.Image")
    paper = np.full((105, 105), 255, np.uint8)
    paper[ink] = 0
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
        for name, (top, left) in list(DRAWINGS[path.stem].items())[::step]:
            ink = slice(top, top + 15), slice(left, left + 15)
            file.writestr(f"{path.stem}/{name}", drawing(ink))
        file.writestr(f"{path.stem}/readme.txt", "no drawing")
        file.writestr("__MACOSX/images_background/._0001_01.png", "left by an archiver")


def test_omniglot_is_converted_from_its_drawings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = serve(monkeypatch, write_drawings)
    data = load("omniglot", download=True)
    names = ["images_background.zip", "images_evaluation.zip"]
    assert [url.rpartition("/")[2] for url in asked] == names
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
    with monkeypatch.context() as patch:  # it is converted once
        patch.setattr(image_files, "_convert_omniglot", lambda _: pytest.fail("again"))
        assert torch.equal(load("omniglot", download=True).train, data.train)
    serve(monkeypatch, lambda path: write_drawings(path, step=-1))  # and split the same each time
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "another" / name)
    again = load("omniglot", download=True)
    assert torch.equal(again.train, data.train) and torch.equal(again.test, data.test)


def test_a_grey_edge_is_averaged(tmp_path: Path) -> None:
    ink = slice(0, 2), slice(0, 15)  # two of the four rows that the first row of cells averages
    with zipfile.ZipFile(tmp_path / "images_background.zip", "w") as file:
        file.writestr("images_background/A/character01/0001_01.png", drawing(ink))
    ((character, cells),) = image_files._drawings(tmp_path / "images_background.zip")
    assert character == "images_background/A/character01"
    assert np.abs(cells[0, :4].astype(int) - 127.5).max() <= 1 and cells[1:].max() == 0


# The digits, and validation rows


def test_the_digits_are_split_without_loss_and_always_the_same() -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    source, labels = sklearn_datasets.load_digits(return_X_y=True)
    state = torch.get_rng_state()
    data = load()
    assert torch.equal(torch.get_rng_state(), state)
    assert data.train.shape == (1437, 64) and data.test.shape == (360, 64)
    assert data.shape == (8, 8) and data.train.dtype == data.test.dtype == torch.float32
    images, ours = torch.cat([data.train, data.test]), [*data.train_labels, *data.test_labels]
    pairs = [(image, int(label)) for image, label in zip(images.tolist(), ours, strict=True)]
    expected = zip((torch.tensor(source) / 16).tolist(), labels.tolist(), strict=True)
    assert sorted(pairs) == sorted(expected), "each image once, with its label"
    assert not set(map(tuple, data.train.tolist())) & set(map(tuple, data.test.tolist()))
    assert data.train_labels[:8].tolist() == [4, 9, 5, 8, 5, 3, 3, 9]
    assert data.test_labels[:8].tolist() == [6, 6, 6, 2, 5, 6, 6, 2]


def test_validation_is_the_end_of_train(small: Path) -> None:
    data = load("mnist", root=small)
    fold = data.split_validation(2)
    assert torch.equal(torch.cat([fold.train, fold.test]), data.train)
    assert fold.train_labels.tolist() == [3, 1, 4] and fold.test_labels.tolist() == [1, 5]
    assert (fold.name, fold.shape) == ("mnist-validation", (28, 28))
    for size in (-1, 0, 5, 6):
        with pytest.raises(ValueError, match=f"from 1 to 4, got {size}"):
            data.split_validation(size)


# Binary images

BINARIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "dynamic": dynamic_binarize,
    "fixed": fixed_binarize,
}
DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize("kind", BINARIZE)
def test_draws_are_independent_with_the_intensity_as_mean(kind: str) -> None:
    binarize, count = BINARIZE[kind], 400_000
    for mean in (0.003, 0.3, 0.99):
        draws = binarize(torch.full((count,), mean))
        assert set(draws.unique().tolist()) == {0.0, 1.0}
        assert abs(draws.mean().item() - mean) < 4 * math.sqrt(mean * (1 - mean) / count)
    draws = binarize(torch.full((1000, 400), 0.5)) - 0.5
    for product in (draws[1:] * draws[:-1], draws[:, 1:] * draws[:, :-1]):
        assert abs(product.mean().item()) < 4 * 0.25 / math.sqrt(product.numel())
    for dtype in DTYPES:
        for shape in ((), (0, 4), (2, 3, 4)):
            for value in (0.0, 1.0):
                x = torch.full(shape, value, dtype=dtype)
                assert binarize(x).dtype == dtype and torch.equal(binarize(x), x), "certain"
    for bad in (-1e-3, 1.001, 255.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got values from"):
            binarize(torch.tensor([0.5, bad]))


def test_dynamic_draws_are_of_a_generator() -> None:
    x, state = torch.full((50, 20), 0.5), torch.get_rng_state()
    first, second = dynamic_binarize(x), dynamic_binarize(x)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(dynamic_binarize(x), first) and torch.equal(dynamic_binarize(x), second)
    state = torch.get_rng_state()
    draws = [dynamic_binarize(x, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_fixed_draws_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, state = torch.rand(50, 20), torch.get_rng_state()
    first = fixed_binarize(x)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.manual_seed(99)
    assert torch.equal(fixed_binarize(x, seed=0), first)
    assert torch.equal(fixed_binarize(x.T.contiguous().T, seed=0), first), "memory order is no part"
    assert not torch.equal(fixed_binarize(x, seed=1), first)
    draws = fixed_binarize(torch.full((16,), 0.5), seed=0)
    assert draws.int().tolist() == [1, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 1, 1, 0]
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


def real_or_skip(name: str) -> Dataset:
    if REAL is None or not (Path(REAL) / name).is_dir():
        pytest.skip(f"PYRO_RECURSIVE_DATA holds no {name}")
    return load(name, root=REAL)


def test_real_mnist() -> None:
    data = real_or_skip("mnist")
    assert data.train.shape == (60_000, 784) and data.test.shape == (10_000, 784)
    # The published counts of each digit, and the mean and deviation that everyone normalises by.
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.train_labels.bincount().tolist() == counts
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9], "the original order"
    assert abs(data.train.mean().item() - 0.1307) < 5e-5
    assert abs(data.train.std().item() - 0.3081) < 5e-5
    assert data.train.min() == 0 and data.train.max() == 1


def test_real_omniglot() -> None:
    data = real_or_skip("omniglot")
    assert data.train.shape == (24_345, 784) and data.test.shape == (8_115, 784)
    labels = torch.cat([data.train_labels, data.test_labels])
    assert labels.bincount().tolist() == [20] * 1623, "twenty drawers of each character"
    assert data.train.mean() < 0.2, "ink is 1, paper 0"
