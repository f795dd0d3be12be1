"""The model of communication: limits that arithmetic gives, published runs, and the tables of docs/scaling.md."""

from dataclasses import replace
from pathlib import Path

import pytest

from olmo_train.model.config import ModelConfig
from olmo_train.model.cost import flops_per_token
from olmo_train.planner import Layout
from olmo_train.scaling import Network, all_reduce_seconds, collective_seconds, scaling_table, step_time

OLMO_7B, NETWORK = ModelConfig(), Network()
LLAMA3_8B = ModelConfig(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, mlp_hidden=14336, vocab_size=128256,
                        padded_vocab_size=128256, seq_len=8192, norm="rms_norm")  # fmt: skip
# torchtitan's figures of December 2024 on H100 with 500 W (benchmarks/llama3_h100_202412_torchtitan.md): tokens/s a GPU
# of Llama 3.1 8B with two sequences a GPU, bf16, selective checkpointing.
PUBLISHED = {"compiled": {8: 6667, 128: 6514}, "eager": {8: 5762, 128: 5605}}
DOC = Path(__file__).parent.parent / "docs" / "scaling.md"


def test_one_gpu_communicates_nothing():
    time = step_time(OLMO_7B, Layout(micro_batch_size=2, micro_batches=3), 400e12, NETWORK)
    assert time.seen_communication == pytest.approx(0, abs=1e-12)
    assert time.tokens_per_second == pytest.approx(400e12 / flops_per_token(OLMO_7B))


def test_a_ring_moves_all_but_ones_own_part():
    fast = replace(NETWORK, efficiency=1.0, hop_seconds=0.0)
    assert collective_seconds(450e9, 8, fast) == pytest.approx(7 / 8)
    assert collective_seconds(400e9, 16, fast) == pytest.approx(15 / 16)  # two nodes of eight adapters with 50 GB/s
    assert all_reduce_seconds(50e9, 2, fast) == pytest.approx(1.0)


def test_replicas_gather_over_fewer_gpus_and_pay_once_a_step():
    latency = replace(NETWORK, between_bytes=1e15, inside_bytes=1e15)  # only hops count
    layout = Layout(gpus=4096, micro_batch_size=1, micro_batches=8)
    plain, replicated = (step_time(OLMO_7B, replace(layout, replicas=r), 400e12, latency) for r in (1, 64))
    assert replicated.seconds < plain.seconds


def test_a_larger_micro_batch_hides_more():
    seen = [
        step_time(OLMO_7B, Layout(gpus=1024, micro_batch_size=rows), 400e12, NETWORK).seen_communication for rows in (1, 2, 8)
    ]
    assert seen[0] > seen[1] > seen[2] > 0


@pytest.mark.parametrize("how", PUBLISHED)
def test_the_published_loss_of_speed_from_8_to_128_gpus_is_told_within_three_hundredths(how):
    layout = Layout(gpus=8, micro_batch_size=2, activation_checkpointing="selective")
    rate = PUBLISHED[how][8] * flops_per_token(LLAMA3_8B)
    few, many = (step_time(LLAMA3_8B, replace(layout, gpus=n), rate, NETWORK).tokens_per_second for n in (8, 128))
    assert many / few == pytest.approx(PUBLISHED[how][128] / PUBLISHED[how][8], abs=0.03)
    assert many < few


def tables() -> list[str]:
    """What docs/scaling.md shows: OLMo-7B at 45% of an H100's peak, two sequences a GPU, and one."""
    counts, rate = [8, 64, 256, 512, 1024, 2048, 4096], 0.45 * 989.4e12
    return [
        "\n".join(scaling_table(OLMO_7B, rate, NETWORK, Layout(micro_batch_size=rows), counts)) for rows in (2, 1)
    ]  # fmt: skip


def test_the_tables_of_the_page_are_what_the_functions_give():
    for table in tables():
        assert table in DOC.read_text(), table


if __name__ == "__main__":
    print("\n\n".join(tables()))
