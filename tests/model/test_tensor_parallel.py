"""transformers' tensor parallelism over two ranks (gloo, CPU) against one process."""

from pathlib import Path


def test_heads_shared_by_two_ranks_give_the_same_logits_and_texts(run_on_two_ranks, tmp_path):
    run_on_two_ranks(Path(__file__).with_name("tensor_parallel_rank.py"), tmp_path)
