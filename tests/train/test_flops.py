import pytest
import torch
from torch import nn

from ssa.model import SSAConfig, SSAForCausalLM
from ssa.train.flops import flops_record, matmul_weights, peak_flops, run_peak_flops, training_flops

SHAPE = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "block_size": 4, "num_selected_blocks": 2, "window_size": 5}  # fmt: skip
PAIR = 3 * 4 * 8
# one document of 11 tokens, then one of 2
POSITIONS = torch.tensor([[*range(11), 0, 1]])


def config(method, **changes):
    return SSAConfig(method=method, **(SHAPE | changes))


def by_hand():
    """Sums over the queries of POSITIONS, counted one by one."""
    dense = sparse = earlier = complete = window = 0
    for p in POSITIONS[0].tolist():
        visible = list(range(p + 1))
        blocks = [[key for key in visible if key // 4 == block] for block in range(p // 4 + 1)]
        dense += len(visible)
        sparse += len(blocks[-1]) + sum(len(block) for block in blocks[:-1][:1])  # its own and k - 1 = 1 other
        earlier += len(blocks) - 1
        complete += sum(len(block) == 4 for block in blocks)
        window += len(visible[-5:])
    return [x / POSITIONS.numel() for x in (dense, sparse, earlier, complete, window)]


@pytest.mark.parametrize("method", ["full", "moba", "nsa", "ssa"])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_but_the_embedding_counts(method, gate, tied):
    c = config(method, attention_gate=gate, tie_word_embeddings=tied)
    model = SSAForCausalLM(c)
    assert matmul_weights(c) == sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert training_flops(c, POSITIONS)["matmul"] == 6 * matmul_weights(c)


def test_attention_is_counted_by_document():
    dense, sparse, earlier, complete, window = by_hand()
    full, moba = (training_flops(config(m), POSITIONS) for m in ("full", "moba"))
    assert (full["dense"], full["sparse"], full["selection"]) == (pytest.approx(12 * PAIR * dense), 0, 0)
    assert (moba["dense"], moba["sparse"], moba["selection"]) == pytest.approx((0, 12 * PAIR * sparse, 2 * PAIR * earlier))
    nsa = training_flops(config("nsa"), POSITIONS)
    assert (nsa["dense"], nsa["sparse"], nsa["selection"]) == pytest.approx((0, moba["sparse"], moba["selection"]))
    assert (nsa["compression"], nsa["window"]) == pytest.approx((12 * PAIR * complete, 12 * PAIR * window))
    for figures in (full, moba, nsa):
        assert figures["total"] == pytest.approx(sum(x for name, x in figures.items() if name != "total"))


@pytest.mark.parametrize("stream", ["full", "sparse"])
def test_ssa_computes_both_streams_whichever_goes_on(stream):
    full, moba = (training_flops(config(m), POSITIONS) for m in ("full", "moba"))
    both = training_flops(config("ssa"), POSITIONS, stream)
    assert (both["dense"], both["sparse"], both["selection"]) == (full["dense"], moba["sparse"], moba["selection"])
    alone = training_flops(config("ssa", alignment_loss="none"), POSITIONS, stream)
    expected = full if stream == "full" else moba
    assert (alone["dense"], alone["sparse"], alone["selection"]) == (expected["dense"], expected["sparse"], expected["selection"])


def test_a_run_records_streams_apart_where_they_differ():
    for c in (config("full"), config("moba"), config("nsa"), config("ssa")):
        figures = training_flops(c, POSITIONS, "sparse")
        assert flops_record(c, POSITIONS) == figures
    apart = flops_record(config("ssa", alignment_loss="none"), POSITIONS)
    assert apart.keys() == {"full", "sparse"}
    assert apart["full"]["sparse"] == 0 < apart["full"]["dense"] and apart["sparse"]["dense"] == 0 < apart["sparse"]["sparse"]


def test_a_forward_pass_has_a_third_of_the_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode

    c = config("full")
    model = SSAForCausalLM(c).eval()
    ids = torch.zeros(1, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    counted = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in counted.items() if str(op) == "aten.mm" or str(op) == "aten.addmm")
    assert linear == training_flops(c, torch.arange(32)[None])["matmul"] / 3 * 32


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("A100-PCIE-40GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None), ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA B200", 2250e12), ("NVIDIA GH200 480GB", None), ("cpu", None), ("", None),
    ],
)  # fmt: skip
def test_the_peak_is_known_by_the_exact_name_or_not_at_all(name, peak):
    assert peak_flops(name) == peak


def test_a_run_has_a_peak_where_it_computes_in_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert run_peak_flops(torch.device("cuda"), torch.bfloat16, 4) == 4 * 989e12
    assert run_peak_flops(torch.device("cuda"), torch.float32) is None
    assert run_peak_flops(torch.device("cpu"), torch.bfloat16) is None
