"""The closed forms equal published models, hand-computed shapes, and the tensors of the model that is really built."""

import itertools
from typing import get_args

import pytest

from olmo_train.model.config import Activation, Block, ModelConfig, Norm
from olmo_train.model.cost import block_parameters, count_parameters, flops_per_token, matrix_parameters

OLMO_1B = ModelConfig(d_model=2048, n_layers=16, n_heads=16, mlp_hidden=8192, tie_embeddings=True)
OLMO_7B = ModelConfig()


def test_parts_of_a_small_model_equal_those_computed_by_hand():
    config = ModelConfig(d_model=8, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, mlp_hidden=10, vocab_size=30,
                         padded_vocab_size=32, norm="layer_norm", bias="norm", qk_norm=True)  # fmt: skip
    count = count_parameters(config)
    assert count.embedding == count.head == 32 * 8
    assert count.attention == 2 * ((24 + 2 * 12) * 8 + 24 * 8)
    assert count.mlp == 2 * (20 * 8 + 8 * 10)
    assert count.norms == 2 * (2 * 16 + 2 * 24 + 2 * 12) + 16
    assert count.total == count.embedding + count.head + 2 * block_parameters(config) + 16
    assert matrix_parameters(config) == count.attention + count.mlp + count.head


def test_a_tied_head_still_multiplies_each_token():
    untied = ModelConfig(d_model=64, n_layers=1, n_heads=2, mlp_hidden=96)
    tied = ModelConfig(d_model=64, n_layers=1, n_heads=2, mlp_hidden=96, tie_embeddings=True)
    assert matrix_parameters(tied) == matrix_parameters(untied)
    assert count_parameters(untied).total - count_parameters(tied).total == 50304 * 64


def test_flops_per_token_equal_the_figures_of_the_convention():
    assert flops_per_token(OLMO_1B) == 6 * 1_176_764_416 + 12 * 16 * 2048 * 2048
    assert flops_per_token(OLMO_1B) / 1e9 == pytest.approx(7.866, abs=5e-4)
    assert flops_per_token(OLMO_1B, seq_len=4096) / 1e9 == pytest.approx(8.671, abs=5e-4)
    assert flops_per_token(OLMO_7B) / 1e9 == pytest.approx(43.31, abs=5e-3)


def test_attention_flops_follow_the_heads_and_not_d_model():
    wide = ModelConfig(d_model=64, n_layers=1, n_heads=4, head_dim=32, mlp_hidden=96)
    assert flops_per_token(wide) - 6 * matrix_parameters(wide) == 12 * 4 * 32 * 2048


def every_shape():
    """Each combination of the fields that add or remove parameters."""
    for norm, bias, activation, block, qk_norm, (tied, rows), kv, head_dim in itertools.product(
        get_args(Norm), ("none", "norm"), get_args(Activation), get_args(Block), (False, True), ((False, None), (True, 40)),
        (None, 2, 1), (None, 6)):  # fmt: skip
        if bias == "none" or norm == "layer_norm":
            yield ModelConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=kv, head_dim=head_dim, mlp_hidden=24,
                              vocab_size=37, padded_vocab_size=rows, seq_len=8, norm=norm, bias=bias, qk_norm=qk_norm,
                              activation=activation, block=block, tie_embeddings=tied)  # fmt: skip


def test_closed_form_equals_the_model_that_is_built_for_every_pair_of_fields():
    """Every seventh of all combinations, among which each two values of two fields come together."""
    import torch

    from olmo_train.model.transformer import Transformer

    for config in itertools.islice(every_shape(), 0, None, 7):
        with torch.device("meta"):
            model = Transformer(config)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        count = count_parameters(config)
        assert sum(sizes.values()) == count.total, config
        assert sum(size for name, size in sizes.items() if "norm" in name) == count.norms, config
