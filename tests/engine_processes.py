"""Run two processes whose q is in one engine. `make fsdp` starts it with the other jobs of two processes."""

from __future__ import annotations

import torch
from test_engines import QUICK, SETTINGS, other, trained  # noqa: F401
from trainer_job import Gradients
from trainer_tools import (
    in_process,
    one_thread,  # noqa: F401
)


def test_two_processes_draw_from_one_engine(other, tmp_path):  # noqa: F811
    """Rank 0 loads and both draw. The run is that of one process, on the same sequences."""
    engine = {"sampler": other.url, "sampler_options": QUICK}
    settings = SETTINGS | engine | {"max_steps": 2}
    both = in_process(tmp_path / "both", processes=2, per_device_train_batch_size=4, **settings)
    alone = trained(tmp_path / "alone", other, per_device_train_batch_size=8, max_steps=2)
    gradients = Gradients()
    alone.add_callback(gradients)
    alone.train()
    # each of the two runs loads a copy, q, and q again after a swap, however many processes it has
    assert other.loads == 2 * (2 + 1)
    assert both["swaps"] == 1
    for name, gradient in both["gradients"].items():
        wanted = gradients.steps[0][name.removeprefix("module.")].flatten()
        assert (torch.tensor(gradient) - wanted).abs().max() < 1e-5, name
