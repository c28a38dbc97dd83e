"""One of two ranks under transformers' Trainer: leaves the gradients of its first step in the folder that is its argument."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_hf_trainer import Uneven, gradients_of_trainer, mean_of_all

from ssa.testing import tiny_model

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name, options in (
        ("model", {}),
        ("outside", {"compute_loss_func": mean_of_all}),
        ("local count", {"average_tokens_across_devices": False}),
    ):
        rows = Uneven(whole_rows=False)
        found, _ = gradients_of_trainer(folder / "run", tiny_model(), rows, 1, 2, ddp_backend="gloo", **options)
        save_file(found[0], folder / f"{name}-{os.environ['RANK']}.safetensors")
