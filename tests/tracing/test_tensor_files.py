"""Files that several processes write, that are links, or that a disk has no room for."""

import errno
import os
import signal
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pyro_recursive.tracing.tensor_files import read_whole, write_whole

resource = pytest.importorskip("resource")


def read(path: Path) -> dict[str, torch.Tensor]:
    return read_whole(path, RuntimeError, "{}")


def test_many_writers_of_one_path_leave_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    write_whole(path, {"x": torch.zeros(5000)})

    def write(number: int) -> None:
        for _ in range(10):
            write_whole(path, {"x": torch.full((5000,), float(number))})

    def look(_: int) -> None:
        for _ in range(30):
            assert len(read(path)["x"].unique()) == 1

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(job, n) for n in range(2) for job in (write, look)]
    for job in jobs:
        job.result()
    assert os.listdir(tmp_path) == ["run.pt"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """The file that it points to is replaced, in its own folder, also where it is yet to come."""
    store, link = tmp_path / "store", tmp_path / "run.pt"
    link.symlink_to(store / "first.pt")
    for value in (1.0, 2.0):
        write_whole(link, {"x": torch.tensor(value)})
        assert link.is_symlink() and not (store / "first.pt").is_symlink()
        assert read(link)["x"] == read(store / "first.pt")["x"] == value
    assert os.listdir(store) == ["first.pt"]


def test_a_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, victim = tmp_path / "run.pt", tmp_path / "victim"
    victim.write_text("untouched")
    monkeypatch.setattr("secrets.token_hex", lambda size: "known")
    planted = tmp_path / ".run.pt.known.part"
    planted.symlink_to(victim)
    with pytest.raises(FileExistsError, match=r"run\.pt"):
        write_whole(path, {"x": torch.ones(3)})
    assert victim.read_text() == "untouched" and not path.exists()


def test_permissions_are_those_of_the_old_file_or_of_any_new_one(tmp_path: Path) -> None:
    path, ordinary = tmp_path / "run.pt", tmp_path / "ordinary"
    ordinary.touch()

    def mode(file: Path) -> int:
        return stat.S_IMODE(file.stat().st_mode)

    write_whole(path, {"x": torch.ones(3)})
    assert mode(path) == mode(ordinary)
    path.chmod(0o640)
    write_whole(path, {"x": torch.ones(3)})
    assert mode(path) == 0o640
    with pytest.raises(OSError, match=f"{tmp_path}' is no regular file"):
        write_whole(tmp_path, {"x": torch.ones(3)})


@pytest.mark.parametrize("size", [4000, 100_000])
def test_a_full_disk_is_named_with_the_path(tmp_path: Path, size: int) -> None:
    """Torch reports a position in the file for it, depending on where it is met."""
    path = tmp_path / "run.pt"
    write_whole(path, {"x": torch.ones(3)})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.SIGXFSZ
    before = signal.signal(handler, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written .*run\.pt'") as caught:
            write_whole(path, {"x": torch.randn(size), "y": torch.randn(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(handler, before)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
    assert read(path)["x"].tolist() == [1.0] * 3
    assert os.listdir(tmp_path) == ["run.pt"]
