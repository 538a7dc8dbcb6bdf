"""Methods of the benchmark of guides: decoder passes an image and step."""

from typing import Any

import pytest
import torch

from benchmarks.methods.guides import DRAWS, LONGER
from benchmarks.run import Settings
from benchmarks.tasks.images import image_task


class Options:
    download = False


@pytest.mark.parametrize("dropped", [False, True])
def test_a_joint_loss_has_the_same_decoder_passes_without_a_dropped_component(
    dropped: bool,
) -> None:
    torch.set_default_dtype(torch.float32)
    settings = Settings("digits", 1, 20, hidden=8, latent=3, eval_points=20, eval_samples=10)
    task = image_task(settings, Options())  # type: ignore[arg-type]
    method = LONGER["recursive 2 MISELBO"](task.make_vae(""), task, settings)
    guide: Any = method.guide
    guide.prepare(task.train[:20])
    while guide.stage.kind != "joint":
        if dropped and guide.stage.kind == "refine":
            guide.drop(retry=False)
        else:
            guide.end_stage()
    assert len(guide.members) == 2 - dropped
    rows = 0

    def count(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal rows
        rows += inputs[0][..., 0].numel()

    step = method.step(task.train[:20])
    step()  # the first one looks at the shapes of the model
    method.vae.decoder.register_forward_hook(count)
    step()
    assert rows == DRAWS * 20
