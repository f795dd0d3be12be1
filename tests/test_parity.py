"""Logits equal those of transformers with the same weights, fp32; the same comparison fails when a detail is wrong.

OLMo's bar: max |difference| <= 2e-5 and <= 5e-6 of the largest logit. A swapped gate gives some 1e5 times as much.
"""

import re

import pytest
import torch
import transformers

from olmo_train.model import transformer as ours
from olmo_train.model.config import ModelConfig
from olmo_train.model.transformer import Transformer

SMALL = dict(d_model=64, n_layers=2, n_heads=4, mlp_hidden=176, vocab_size=500, padded_vocab_size=512, seq_len=64)
THEIRS = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=176, vocab_size=512, pad_token_id=1,
              max_position_embeddings=64, attn_implementation="eager", bos_token_id=None, eos_token_id=2)  # fmt: skip


def build(**options) -> Transformer:
    """Weights with the deviations that training gives: matrices about 1/sqrt(width), norms about 1."""
    model = Transformer(ModelConfig(**{**SMALL, **options}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5))
            if p.ndim == 1 and model.config.norm != "rms_norm_offset":
                p.add_(1.0)
            if name == "embed.weight":
                p.mul_(8.0)
    return model.eval()


def hf_state(model: Transformer) -> dict[str, torch.Tensor]:
    """Our weights under the names of transformers."""
    config, state = model.config, {}
    weights = {name: p.detach() for name, p in model.named_parameters()}
    state["model.embed_tokens.weight"] = weights["embed.weight"]
    state["lm_head.weight"] = weights["embed.weight" if config.tie_embeddings else "head.weight"]
    norms = ("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")
    if config.block == "reordered_norm":
        norms = ("attn_norm", "post_attention_layernorm"), ("mlp_norm", "post_feedforward_layernorm")
    norms += ("attn.q_norm", "self_attn.q_norm"), ("attn.k_norm", "self_attn.k_norm")
    for i in range(config.n_layers):
        a, b = f"blocks.{i}.", f"model.layers.{i}."
        state |= {f"{b}self_attn.{n}_proj.weight": weights[f"{a}attn.w{n}.weight"] for n in "qkvo"}
        state |= {f"{b}mlp.{n}_proj.weight": weights[f"{a}mlp.w_{n}.weight"] for n in ("gate", "up", "down")}
        state |= {f"{b}{to}.weight": weights[f"{a}{of}.weight"] for of, to in norms if f"{a}{of}.weight" in weights}
    if "norm.weight" in weights:
        state["model.norm.weight"] = weights["norm.weight"]
    return state


def reference(model: Transformer, name: str = "Olmo", **options):
    config = getattr(transformers, f"{name}Config")(**{**THEIRS, **options})
    theirs = getattr(transformers, f"{name}ForCausalLM")(config)
    state = hf_state(model)
    if model.config.tie_embeddings:
        assert config.tie_word_embeddings
    theirs.load_state_dict(state)  # strict: each name and shape on both sides
    return theirs.float().eval()


def difference(model: Transformer, theirs) -> tuple[float, float]:
    """(max |difference of logits|, the same relative to the largest logit)."""
    ids = torch.randint(500, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = model(ids), theirs(input_ids=ids).logits
    assert a.shape == b.shape == (3, 64, 512) and 1 < b.abs().max() < 100
    most = (a - b).abs().max().item()
    return most, most / b.abs().max().item()


def equal(model: Transformer, theirs) -> bool:
    most, relative = difference(model, theirs)
    return most <= 2e-5 and relative <= 5e-6


VARIANTS = {
    "untied": ({}, {}),
    "tied": (dict(tie_embeddings=True), dict(tie_word_embeddings=True)),
    "gqa": (dict(n_kv_heads=2), dict(num_key_value_heads=2)),
    "mqa": (dict(n_kv_heads=1), dict(num_key_value_heads=1)),
    "clip_qkv": (dict(clip_qkv=0.7), dict(clip_qkv=0.7)),
    "theta": (dict(rope_theta=500.0), dict(rope_theta=500.0)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_olmo(variant):
    mine, theirs = VARIANTS[variant]
    if "rope_theta" in theirs and hasattr(transformers.OlmoConfig(), "rope_parameters"):
        theirs = {"rope_parameters": {"rope_type": "default", "rope_theta": theirs["rope_theta"]}}
    model = build(**mine)
    most, relative = difference(model, reference(model, **theirs))
    assert most <= 2e-5 and relative <= 5e-6


def interleaved(x, cos, sin):
    """The other kind of RoPE: dimension 2i turns with 2i + 1."""
    D = x.shape[-1]
    order = torch.cat((torch.arange(0, D, 2), torch.arange(1, D, 2)))
    return ours_rotate(x[..., order], cos, sin)[..., order.argsort()]


ours_rotate = ours.rotate


def test_the_comparison_fails_when_gate_and_up_are_swapped():
    model = build()
    theirs = reference(model)
    swapped = Transformer(model.config)
    other = {"w_gate": "w_up", "w_up": "w_gate"}
    swapped.load_state_dict({re.sub("w_gate|w_up", lambda m: other[m[0]], key): p for key, p in model.state_dict().items()})
    assert equal(model, theirs) and not equal(swapped, theirs)


def test_the_comparison_fails_with_another_eps():
    model = build()
    theirs = reference(model)
    other = Transformer(ModelConfig(**SMALL, norm_eps=1e-3))
    other.load_state_dict(model.state_dict())
    assert equal(model, theirs) and not equal(other, theirs)


def test_the_comparison_fails_with_interleaved_rope(monkeypatch):
    model = build()
    theirs = reference(model)
    assert equal(model, theirs)
    monkeypatch.setattr(ours, "rotate", interleaved)
    assert not equal(model, theirs)


@pytest.mark.parametrize("wrong", [dict(rope_theta=500.0), dict(clip_qkv=0.7)])
def test_the_comparison_fails_when_an_option_is_dropped(wrong):
    model = build()
    other = Transformer(ModelConfig(**SMALL, **wrong))
    other.load_state_dict(model.state_dict())
    assert not equal(other, reference(model))


OTHERS = {
    "Llama": (dict(norm="rms_norm", n_kv_heads=2), dict(rms_norm_eps=1e-5, num_key_value_heads=2)),
    "Olmo2": (
        dict(norm="rms_norm", norm_eps=1e-6, qk_norm=True, block="reordered_norm", n_kv_heads=2),
        dict(rms_norm_eps=1e-6, num_key_value_heads=2),
    ),
    "Gemma": (
        dict(norm="rms_norm_offset", norm_eps=1e-6, activation="geglu", embedding_scale=True, tie_embeddings=True,
             n_kv_heads=1, head_dim=24),
        dict(rms_norm_eps=1e-6, head_dim=24, num_key_value_heads=1, hidden_activation="gelu_pytorch_tanh",
             tie_word_embeddings=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_logits_equal_those_of_other_families(name):
    mine, theirs = OTHERS[name]
    model = build(**mine)
    _, relative = difference(model, reference(model, name, **theirs))
    assert relative <= 5e-6
