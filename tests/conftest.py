import os
import socket
import subprocess
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels run on the CPU, on tiny shapes

from ssa.config import DataRecipe, Recipe
from ssa.data.prepare import prepare
from ssa.data.tokenizer import byte_tokenizer
from ssa.testing import save_checkpoint, tiny_model


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """Tests run side by side in processes, so each keeps to one core."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def run_on_two_ranks():
    """Start `python ARGUMENTS` twice with what torchrun sets; (standard output, standard error) of each rank."""
    processes = []

    def run(*arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "OMP_NUM_THREADS": 1}
        for rank in (0, 1):
            environment = {name: str(value) for name, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()}
            command = [sys.executable, *map(str, arguments)]
            processes.append(
                subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        said = [process.communicate() for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
        return said

    yield run
    for process in processes:
        process.kill()


TEXTS = [f"Document {i}. " + "It has a few words, é and ü among them. " * (i + 2) + "\n" for i in range(6)]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A prepared directory of six short documents."""
    directory = tmp_path_factory.mktemp("data")
    for i, text in enumerate(TEXTS):
        (directory / f"{i}.txt").write_text(text, encoding="utf-8")
    prepare([str(directory)], directory / "shards", valid_fraction=0.5, workers=1)
    return directory / "shards"


@pytest.fixture
def make_run(tmp_path, prepared):
    """A run directory as training leaves it, with a model of random weights."""

    def make(method="ssa", step=7, data=prepared, name="run"):
        run = tmp_path / name
        save_checkpoint(run, step, tiny_model(method, seed=step), byte_tokenizer(), None, {})
        (run / "recipe.json").write_text(Recipe(data=DataRecipe(path=str(data), context=64)).to_json())
        return run

    return make


if device := os.environ.get("SSA_TEST_DEVICE"):  # e.g. cuda: runs tests/ops, tests/attention and tests/model there
    torch.set_default_device(device)


@pytest.fixture
def on_the_cpu():
    """For tests of other libraries that make their generators and batches on the CPU, whatever device others run on."""
    with torch.device("cpu"):
        yield


def varlen_reference(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """What PyTorch's kernel does on a GPU, document by document; in every one the last query reads the last key."""
    assert q.ndim == k.ndim == 3 and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q.shape == cu_seq_k.shape
    assert (cu_seq_q[0], cu_seq_k[0], cu_seq_q[-1], cu_seq_k[-1]) == (0, 0, len(q), len(k)) and window_size[1] == 0
    outs = []
    for a, b, c, d in zip(cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:], strict=True):
        queries, keys = int(b - a), int(d - c)
        assert 0 <= queries <= max_q and queries <= keys <= max_k
        ahead = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
        mask = (ahead <= 0) & ((ahead >= -window_size[0]) if window_size[0] >= 0 else True)
        x, y, z = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        out = torch.nn.functional.scaled_dot_product_attention(x, y, z, attn_mask=mask, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.fixture
def varlen_calls(monkeypatch):
    """Dense attention goes the way of a GPU, with the kernel in plain PyTorch; the calls of it."""
    from ssa.ops import dense

    calls = []
    monkeypatch.setattr(dense, "_has_varlen", lambda q: True)
    monkeypatch.setattr(dense.varlen, "varlen_attn", lambda *a, **kw: calls.append(a) or varlen_reference(*a, **kw))
    return calls
