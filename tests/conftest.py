import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels run on the CPU, on tiny shapes


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """Tests run side by side in processes, so each keeps to one core."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


if device := os.environ.get("SSA_TEST_DEVICE"):  # e.g. cuda: runs tests/ops, tests/attention and tests/model there
    torch.set_default_device(device)
