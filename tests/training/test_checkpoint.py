"""Interrupted, killed and resumed runs, and files that do not fit."""

import os
import random
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_recursive import IWAE_ELBO
from pyro_recursive.training import Aggressive, CheckpointError, burda_schedule, fit
from pyro_recursive.training import checkpoint as checkpoints
from tests.oracles.bitwise import same
from tests.oracles.training import (
    PROGRAMS,
    ROWS,
    aggressive,
    auto_normal,
    early,
    interrupt_at,
    noisy,
    normal_data,
    outcome,
    run,
    sgd,
    store,
    vae,
    vae_loader,
)

interrupted = partial(pytest.warns, UserWarning, match="Training was interrupted in epoch")
QUICK = {"auto_normal", "vae", "late parameters", "loss with parameters"}


@pytest.mark.filterwarnings("ignore:.*have no part in the mixture")
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PROGRAMS],
)
def test_interrupt_and_resume_equals_no_interrupt(name: str, tmp_path: Path) -> None:
    program, path, other = PROGRAMS[name], tmp_path / "whole.pt", tmp_path / "broken.pt"
    expected = outcome(run(program, checkpoint=path), path)
    last = expected["history"]["steps"][-1] + expected["history"]["guide_steps"][-1]
    calls = range(last) if name == "vae" else random.Random(name).sample(range(last), 3)
    for call in calls:
        other.unlink(missing_ok=True)
        with interrupted():
            assert run(program, checkpoint=other, transform=interrupt_at(call)).interrupted
        pyro.set_rng_seed(99)  # another process has another random state
        resumed = run(program, checkpoint=other, resume=True, seed=None if other.exists() else 1)
        assert same(outcome(resumed, other), expected), f"interrupted in call {call}"


@pytest.mark.parametrize("call", [1, 5, 7])
def test_a_run_goes_on_within_an_epoch(call: int, tmp_path: Path) -> None:
    path, other = tmp_path / "whole.pt", tmp_path / "broken.pt"
    expected = outcome(run(vae, checkpoint=path), path)
    options: dict[str, Any] = {"checkpoint": other, "checkpoint_seconds": 0.0}
    with interrupted():
        run(vae, **options, transform=interrupt_at(call))
    assert checkpoints.load(other)["learner"]["steps"] == call  # not those of whole epochs alone
    pyro.set_rng_seed(99)
    resumed = run(vae, **options, resume=True, seed=None)
    assert same(outcome(resumed, other), expected)


def test_resume_in_the_same_process(tmp_path: Path) -> None:
    path, arguments = tmp_path / "run.pt", vae()
    expected = outcome(run(vae, checkpoint=path), path)["history"]
    common = {"epochs": 4, "batch_size": 4, "seed": 1, "progress": False, "checkpoint": path}
    pyro.clear_param_store()
    with interrupted():
        fit(**arguments, **common, transform=interrupt_at(8))
    assert same(asdict(fit(**arguments, **common, transform=noisy, resume=True)), expected)


@pytest.mark.slow
def test_a_finished_run_returns_at_once_and_goes_on_with_more_epochs(tmp_path: Path) -> None:
    path, other = tmp_path / "long.pt", tmp_path / "short.pt"
    whole = partial(early, patience=float("inf"))
    expected = outcome(run(whole, epochs=5, checkpoint=path), path)
    short = run(whole, epochs=2, checkpoint=other)
    best = store()
    written = other.read_bytes()
    again = run(whole, epochs=2, checkpoint=other, resume=True)
    assert asdict(again) == asdict(short)
    assert same(store(), best)
    assert other.read_bytes() == written
    longer = run(whole, epochs=5, checkpoint=other, resume=True)
    assert same(outcome(longer, other), expected)


# --- Files


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new folder" / "run.pt"
    history = run(auto_normal, epochs=1, checkpoint=path)
    before = path.read_bytes()

    def full_disk(state: Any, file: Any) -> None:
        file.write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        run(auto_normal, epochs=2, checkpoint=path, resume=True)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["run.pt"]
    assert checkpoints.load(path)["history"]["loss"] == history.loss


def other_kind(path: Path) -> None:
    torch.save({"parameters": {}}, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    state = checkpoints.load(path)["random"][0]["torch"].numpy().tobytes()
    content[content.find(state) + 100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [other_kind, truncate, flip_a_byte])
def test_a_damaged_file_is_named(damage: Callable, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(auto_normal, checkpoint=path)
    damage(path)
    with pytest.raises(CheckpointError, match=r"run\.pt'.*delete it to start afresh"):
        run(auto_normal, checkpoint=path, resume=True)


def wide_normal() -> dict[str, Any]:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        pyro.sample("extra", dist.Normal(0.0, 1.0))
        with pyro.plate("data", ROWS, subsample=x):
            pyro.sample("x", dist.Normal(mean.sum(), 1.0), obs=x)

    return {**auto_normal(), "model": model, "guide": AutoNormal(model)}


def without_norm() -> dict[str, Any]:
    arguments = vae_loader(generator=True)
    arguments["model"].__self__.encoder[1] = nn.LayerNorm(4)
    return arguments


MISFITS = {
    "parameters": (auto_normal, wide_normal, {}, r"locs.mean' is 'float64\[\]' in the file, "
                   r"'float64\[3\]' here;.* 'AutoNormal.locs.extra' is 'missing' in the file"),
    "buffers": (without_norm, partial(vae_loader, generator=True), {},
                r"'0.encoder.1.running_mean' is 'missing' in the file, 'float64\[4\]' here"),
    "order": (partial(vae_loader, generator=True), partial(vae_loader, generator=False), {},
              "generators is 1 in the file, 0 here"),
    "loss": (vae, vae, {"loss": IWAE_ELBO(4)}, "loss is 'TraceMeanField_ELBO' in the file, "
             "'IWAE_ELBO' here; loss.num_particles is 1 in the file, 4 here"),
    "estimator": (lambda: {**vae(), "loss": IWAE_ELBO(4)}, vae,
                  {"loss": IWAE_ELBO(4, estimator="dreg")},
                  ": loss.estimator is 'pathwise' in the file, 'dreg' here. Resume"),
    "learning rate": (auto_normal, auto_normal, {"optimizer": partial(torch.optim.Adam, lr=0.5)},
                      ": lr is 0.001 in the file, 0.5 here. Resume"),
    "aggressive": (partial(aggressive, False), vae,
                   {"aggressive": Aggressive(max_steps=4), "validation": torch.ones(2, 2).double()},
                   r"aggressive is 'Aggressive\(max_steps=3, .*in the file, .*\(max_steps=4"),
    **{" ".join(changes): (auto_normal, auto_normal, changes, message) for changes, message in (
        ({"optimizer": sgd}, "optimizer is 'Adam' in the file, 'SGD' here"),
        ({"scheduler": burda_schedule}, "scheduler is None in the file, 'LambdaLR' here"),
        ({"shuffle": False}, "shuffle is True in the file, False here"),
        ({"batch_size": 8}, "batch_size is 4 in the file, 8 here"),
        ({"data": torch.ones(8)}, "rows of data is 12 in the file, 8 here"),
        ({"data": normal_data() + 1e-6}, "contents of data is '[0-9a-f]+' in the file, '"),
        ({"data": normal_data().float()}, "contents of data is '[0-9a-f]+' in the file, '"),
        ({"validation": normal_data()}, "contents of validation is None in the file, '"),
        ({"transform": lambda x: x}, "transform is 'noisy' in the file, '<lambda>' here. Resume"),
        ({"clip_norm": 3.0}, "clip_norm is inf in the file, 3.0 here"),
        ({"kl_warmup": 3}, "kl_warmup is 0 in the file, 3 here"),
        ({"seed": 2}, "seed is 1 in the file, 2 here"),
        ({"batch_size": 8, "clip_norm": 1.0}, "clip_norm is inf in the file, 1.0 here; batch_size "
                                              "is 4 in the file, 8 here. Resume"),
    )},
}  # fmt: skip


@pytest.mark.quick(9)
@pytest.mark.parametrize("kind", MISFITS)
def test_a_file_of_another_program_changes_nothing(kind: str, tmp_path: Path) -> None:
    one, other, changes, message = MISFITS[kind]
    path = tmp_path / "run.pt"
    run(one, checkpoint=path)
    arguments = other()
    run(lambda: arguments, epochs=1, **changes)

    def everything() -> tuple[Any, ...]:
        module = getattr(arguments["model"], "__self__", nn.Module())
        order = getattr(arguments["data"], "generator", None) or torch.Generator().manual_seed(0)
        grads = [site.unconstrained().grad is None for site in pyro.get_param_store().values()]
        buffers = {name: tensor.clone() for name, tensor in module.named_buffers()}
        return store(), buffers, order.get_state(), grads

    before = everything()
    arguments = {"batch_size": 4, **arguments, "transform": noisy, **changes}
    with pytest.raises(CheckpointError, match=rf"run\.pt'.*{message}"):
        fit(**arguments, epochs=9, checkpoint=path, resume=True, progress=False)
    assert same(everything(), before)
    assert all(before[-1])


def test_what_is_hashed_of_the_data() -> None:
    """Dtype, shape, and rows up to the last one; a TensorDataset's tensors."""
    x, names = torch.arange(3e4).reshape(-1, 3), checkpoints.fingerprint
    others = [x.float(), x.half(), x.reshape(-1, 6), x + 1, x.flip(0), x[:-1], x > 5, x.bfloat16()]
    last = x.clone()
    last[-1, -1] = 0
    codes = [names((each,)) for each in (x, last, *others)] + [names((x, x))]
    assert len(set(codes)) == len(codes)
    assert names((x.clone(),)) == names([x.T.contiguous().T]) == codes[0]
    assert names(DataLoader(TensorDataset(x), 5)) == codes[0]
    assert names(DataLoader(list(x), 5)) == "list"


def test_files_of_earlier_versions_are_resumed(tmp_path: Path) -> None:
    """They do not say what the data were."""
    path = tmp_path / "run.pt"
    run(auto_normal, checkpoint=path, epochs=1)
    state = checkpoints.load(path)
    for name in ("transform", "contents of data", "contents of validation"):
        del state["settings"][name]
    checkpoints.save(path, state)
    assert len(run(auto_normal, checkpoint=path, resume=True).epoch) == 4


def test_tensors_among_options_are_compared_by_value() -> None:
    """A loss's ``holdout`` of any size, on any device."""
    one, other = torch.zeros(2000), torch.zeros(2000)
    other[1000] = 1e-6
    plain = checkpoints.plain
    assert plain((one, "x")) == plain((one.clone(), "x")) != plain((other, "x"))


def test_what_may_differ(tmp_path: Path) -> None:
    loss = Trace_ELBO(num_particles=2, vectorize_particles=True)
    path, program = tmp_path / "run.pt", {**auto_normal(), "loss": loss}
    options = {"validation": normal_data(), "checkpoint": path}
    run(lambda: program, **options, clip_norm=np.float64(5.0), batch_size=np.int64(4))
    options["clip_norm"], loss.calls = 5, 12  # an attribute that is no argument of the loss
    changes = {"epochs": 6, "patience": 9.0, "validate_every": 2, "check_every": 3, "seed": None}
    assert len(run(lambda: program, **options, **changes, resume=True).epoch) == 6
    with pytest.raises(CheckpointError, match="seed is 1 in the file, 2 here"):
        run(lambda: program, **options, seed=2, resume=True)
