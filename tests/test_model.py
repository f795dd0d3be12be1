"""The transformer against references written out by hand: every variant of norm, activation, block and attention."""

import itertools
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F

from olmo_train.model import loss
from olmo_train.model.config import ModelConfig
from olmo_train.model.init import INITS, init_std, initial_value, param_seed
from olmo_train.model.loss import IGNORE
from olmo_train.model.norms import NORMS
from olmo_train.model.transformer import ACTIVATIONS, BLOCKS, KVCache, Transformer, rope_tables, rotate

SMALL = dict(d_model=16, n_layers=2, n_heads=4, mlp_hidden=20, vocab_size=37, padded_vocab_size=40, seq_len=12)


def build(seed: int = 0, **options) -> Transformer:
    """A small model whose weights, those of norms and biases too, are far from their first values."""
    model = Transformer(ModelConfig(**{**SMALL, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(37, (rows, length), generator=torch.Generator().manual_seed(5))


# ---- a reference in loops, float64 throughout, which shares no line with the model


def reference_norm(x, weights, name, config):
    x = x.double()
    if config.norm.startswith("rms_norm"):
        y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.norm_eps)
        return y * (weights[f"{name}.weight"] + (1 if config.norm == "rms_norm_offset" else 0))
    mean = x.mean(-1, keepdim=True)
    y = (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + config.norm_eps)
    if config.norm == "layer_norm":
        y = y * weights[f"{name}.weight"]
        y = y + weights[f"{name}.bias"] if config.bias == "norm" else y
    return y


def reference_rope(x, config):
    """x (T, D): dimension i and i + D/2 are one complex number, turned by t / theta^(2i/D)."""
    T, D = x.shape
    out = torch.empty_like(x)
    for t, i in itertools.product(range(T), range(D // 2)):
        angle = t / config.rope_theta ** (2 * i / D)
        turned = complex(x[t, i], x[t, i + D // 2]) * complex(math.cos(angle), math.sin(angle))
        out[t, i], out[t, i + D // 2] = turned.real, turned.imag
    return out


def reference_attention(x, weights, layer, config):
    """One sequence x (T, C)."""
    D, groups = config.head_size, config.n_heads // config.kv_heads
    q, k, v = (x @ weights[f"{layer}.w{name}.weight"].T for name in "qkv")
    if config.clip_qkv is not None:
        q, k, v = (y.clamp(-config.clip_qkv, config.clip_qkv) for y in (q, k, v))
    if config.qk_norm:
        q, k = reference_norm(q, weights, f"{layer}.q_norm", config), reference_norm(k, weights, f"{layer}.k_norm", config)
    heads = []
    for h in range(config.n_heads):
        kv = slice(h // groups * D, (h // groups + 1) * D)  # heads that share keys lie side by side
        query, key = reference_rope(q[:, h * D : (h + 1) * D], config), reference_rope(k[:, kv], config)
        rows = []
        for t in range(len(x)):
            scores = torch.stack([query[t] @ key[s] / math.sqrt(D) for s in range(t + 1)])
            rows.append(torch.softmax(scores, 0) @ v[: t + 1, kv])
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=1) @ weights[f"{layer}.wo.weight"].T


def reference_mlp(x, weights, layer, config):
    y = x @ weights[f"{layer}.w_up.weight"].T
    if config.activation == "gelu":
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    else:
        up, gate = y, x @ weights[f"{layer}.w_gate.weight"].T
        if config.activation == "swiglu":
            y = gate / (1 + torch.exp(-gate)) * up
        else:
            y = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    return y @ weights[f"{layer}.w_down.weight"].T


def reference_logits(model: Transformer, sequence: torch.Tensor) -> torch.Tensor:
    config, weights = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    x = weights["embed.weight"][sequence] * (math.sqrt(config.d_model) if config.embedding_scale else 1)
    for i in range(config.n_layers):
        b = f"blocks.{i}"
        if config.block == "parallel":
            normed = reference_norm(x, weights, f"{b}.norm", config)
            x = x + reference_attention(normed, weights, f"{b}.attn", config)
            x = x + reference_mlp(normed, weights, f"{b}.mlp", config)
        elif config.block == "sequential":
            x = x + reference_attention(reference_norm(x, weights, f"{b}.attn_norm", config), weights, f"{b}.attn", config)
            x = x + reference_mlp(reference_norm(x, weights, f"{b}.mlp_norm", config), weights, f"{b}.mlp", config)
        else:
            x = x + reference_norm(reference_attention(x, weights, f"{b}.attn", config), weights, f"{b}.attn_norm", config)
            x = x + reference_norm(reference_mlp(x, weights, f"{b}.mlp", config), weights, f"{b}.mlp_norm", config)
    head = weights["embed.weight"] if config.tie_embeddings else weights["head.weight"]
    return reference_norm(x, weights, "norm", config) @ head.T


VARIANTS = {
    "olmo": {},
    "layer_norm": dict(norm="layer_norm"),
    "layer_norm_bias": dict(norm="layer_norm", bias="norm"),
    "rms_norm": dict(norm="rms_norm"),
    "rms_norm_offset": dict(norm="rms_norm_offset"),
    "eps": dict(norm="rms_norm", norm_eps=0.3),
    "geglu": dict(activation="geglu"),
    "gelu": dict(activation="gelu"),
    "parallel": dict(block="parallel", norm="layer_norm"),
    "reordered_norm": dict(block="reordered_norm", norm="rms_norm", qk_norm=True),
    "qk_norm_layer_norm": dict(qk_norm=True, norm="layer_norm", bias="norm", n_kv_heads=2),
    "gqa": dict(n_kv_heads=2),
    "mqa": dict(n_kv_heads=1),
    "head_dim": dict(head_dim=6, n_kv_heads=2),
    "clip_qkv": dict(clip_qkv=0.5),
    "theta": dict(rope_theta=30.0),
    "tied": dict(tie_embeddings=True),
    "gemma": dict(
        tie_embeddings=True, embedding_scale=True, norm="rms_norm_offset", activation="geglu", n_kv_heads=1, head_dim=8
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_reference(variant):
    model, sequence = build(**VARIANTS[variant]), ids()[0]
    with torch.no_grad():
        logits = model(sequence[None])[0]
    expected = reference_logits(model, sequence)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=2e-5)


def test_every_row_of_the_tables_is_named_in_the_configuration_and_used_above():
    for field, table in {"norm": NORMS, "activation": ACTIVATIONS, "block": BLOCKS, "init": INITS}.items():
        assert tuple(table) == get_args(get_type_hints(ModelConfig)[field])
        if field != "init":
            used = {getattr(ModelConfig(**{**SMALL, **options}), field) for options in VARIANTS.values()}
            assert used == set(table)


NEW_ROWS = {  # file: its table and a row to add
    "model/norms.py": ("NORMS", '"new": lambda size, eps, bias: RMSNorm(size, eps, offset=0.5)'),
    "model/transformer.py": ("ACTIVATIONS", '"newglu": F.relu'),
    "model/init.py": ("INITS", '"new": lambda kind, layer, config: 0.5'),
    "optim/schedules.py": ("SCHEDULES", '"new": lambda step, config, total_steps: config.peak_lr / step'),
    "optim/build.py": ("OPTIMIZERS", '"new": lambda parameters, *rest: torch.optim.SGD(parameters.values(), lr=0.5)'),
}
USE_THEM = """
import torch
from olmo_train.model.config import ModelConfig
from olmo_train.model.init import init_std
from olmo_train.model.transformer import Transformer
from olmo_train.optim.build import build_optimizer
from olmo_train.optim.config import OptimConfig
from olmo_train.optim.schedules import lr_at
config = ModelConfig(n_layers=1, d_model=8, n_heads=2, mlp_hidden=8, vocab_size=9, norm="new", activation="newglu", init="new")
model = Transformer(config)
model(torch.tensor([[1, 2]]))
optim = OptimConfig(name="new", schedule="new", warmup_steps=0, peak_lr=1.0)
optimizer = build_optimizer(dict(model.named_parameters()), optim)
print(init_std("head.weight", config), lr_at(4, optim, 9), type(optimizer).__name__)
"""


def test_a_row_in_one_file_is_all_that_a_new_choice_takes(tmp_path):
    shutil.copytree(Path(loss.__file__).parents[1], tmp_path / "olmo_train")
    for file, (table, row) in NEW_ROWS.items():
        source = (tmp_path / "olmo_train" / file).read_text("utf-8")
        assert source.count(f"{table} = {{") == 1
        (tmp_path / "olmo_train" / file).write_text(source.replace(f"{table} = {{", f"{table} = {{{row}, "), "utf-8")
    out = subprocess.run([sys.executable, "-c", USE_THEM], capture_output=True, text=True, cwd=tmp_path)
    assert out.stdout.split() == ["0.5", "0.25", "SGD"], out.stderr


# ---- shapes and first values


def mitchell(kind: str, layer: int, config: ModelConfig) -> float:
    if kind == "attn.wo":
        return 1 / math.sqrt(2 * config.d_model * (layer + 1))
    if kind == "mlp.w_down":
        return 1 / math.sqrt(2 * config.mlp_hidden * (layer + 1))
    return 1 / math.sqrt(config.d_model)


def test_first_values_have_the_deviation_of_each_kind_and_layer_and_are_cut_at_three():
    config = ModelConfig(d_model=128, n_layers=3, n_heads=4, mlp_hidden=320, vocab_size=500, norm="layer_norm", bias="norm")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(config).named_parameters()}
    # A normal distribution cut at 3 has this share of its own deviation.
    cut = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))
    for name, shape in shapes.items():
        value = initial_value(name, shape, config, seed=7)
        if "norm" in name:
            assert torch.equal(value, torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)), name
            continue
        layer = int(name.split(".")[1]) if name.startswith("blocks") else 0
        std = mitchell(name.removeprefix(f"blocks.{layer}.").removesuffix(".weight"), layer, config)
        assert init_std(name, config) == pytest.approx(std)
        assert value.std().item() == pytest.approx(cut * std, rel=0.02), name
        assert value.abs().max() <= 3 * std and abs(value.mean().item()) < 0.05 * std, name
        assert value.abs().max() > 2.8 * std, f"{name} is cut too early"


def test_normal_init_has_one_deviation_and_offset_norms_start_as_the_identity():
    config = ModelConfig(**SMALL, init="normal", init_std=0.05, norm="rms_norm_offset")
    for name in ("embed.weight", "head.weight", "blocks.1.attn.wo.weight", "blocks.1.mlp.w_down.weight"):
        assert init_std(name, config) == 0.05
    assert not initial_value("blocks.0.attn_norm.weight", torch.Size([16]), config, 0).any()


def test_first_values_are_the_same_with_every_torch_and_fill_the_normal_distribution_that_is_cut():
    """The golden ones were drawn with torch 2.13; torch's own trunc_normal_ gives others in 2.11 than in 2.13."""
    config = ModelConfig(**{**SMALL, "d_model": 64})
    value = initial_value("embed.weight", torch.Size([512, 64]), config, seed=6198)
    golden = [-0.004677858669310808, 0.1515490561723709, 0.08242962509393692, -0.2030373364686966]
    assert value.flatten()[:4].tolist() == pytest.approx(golden, rel=1e-6)
    drawn = (value.double() * 64**0.5).flatten().sort().values  # in standard deviations
    inside = math.erf(3 / math.sqrt(2))
    share = (torch.erf(drawn / math.sqrt(2)) / inside + 1) / 2  # of the cut distribution that lies below
    expected = (torch.arange(len(drawn), dtype=torch.float64) + 0.5) / len(drawn)
    assert (share - expected).abs().max() < 1.63 / len(drawn) ** 0.5  # Kolmogorov and Smirnov, at 1%


def test_a_parameter_without_a_rule_has_no_first_value():
    for name in ("blocks.0.attn.wqkv.weight", "blocks.0.attn.wq.bias", "blocks.0.attn.lora_a.weight", "head.bias"):
        with pytest.raises(AssertionError, match=f"no initial value is defined for {name}"):
            initial_value(name, torch.Size([4, 4]), ModelConfig(**SMALL), seed=0)


def test_first_values_depend_on_seed_and_name_and_on_nothing_else():
    config, shape = ModelConfig(**SMALL), torch.Size([16, 16])
    draw = lambda name, seed: initial_value(name, shape, config, seed)  # noqa: E731
    torch.manual_seed(1)
    first = draw("blocks.0.attn.wo.weight", 1)
    torch.manual_seed(2)
    assert torch.equal(first, draw("blocks.0.attn.wo.weight", 1))
    assert not torch.equal(first, draw("blocks.0.attn.wo.weight", 2))
    assert not torch.equal(draw("blocks.0.attn.wq.weight", 1), draw("blocks.1.attn.wq.weight", 1))
    assert param_seed(11, "a") != param_seed(1, "1:a")


# ---- loss, causality, documents, cache


def test_the_loss_is_the_sum_over_scored_labels_of_each_sequence():
    model, tokens = build(), ids(3)
    labels = tokens.roll(-1, dims=1)
    labels[0, 3:] = IGNORE
    labels[1] = IGNORE
    with torch.no_grad():
        losses, logits = model(tokens, labels), model(tokens)
    for row in range(3):
        scored = [(t, int(label)) for t, label in enumerate(labels[row]) if label != IGNORE]
        expected = -sum(F.log_softmax(logits[row, t].double(), 0)[label] for t, label in scored)
        assert losses[row].item() == pytest.approx(float(expected), rel=1e-5)
    assert losses.dtype == torch.float32 and losses[1] == 0


@pytest.mark.parametrize("variant", ["olmo", "parallel", "reordered_norm", "gqa"])
def test_a_later_token_changes_no_earlier_logit(variant):
    model, tokens = build(**VARIANTS[variant]), ids(1)
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 37
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:7], after[:7])
    assert not torch.allclose(before[7:], after[7:])


@pytest.mark.parametrize("variant", ["olmo", "mqa", "clip_qkv", "gemma"])
@pytest.mark.parametrize("steps", [[12], [1] * 12, [5, 1, 1, 5], [3, 4, 5]])
def test_logits_with_a_cache_equal_those_without(variant, steps):
    model, tokens = build(**VARIANTS[variant]), ids()
    cache, parts = KVCache(), []
    with torch.no_grad():
        for part in tokens.split(steps, dim=1):
            parts.append(model(part, cache=cache))
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-5, atol=1e-5)
    assert cache.length == 12


def test_documents_in_one_row_are_as_if_they_were_alone():
    model, tokens = build(n_kv_heads=2), ids(2)
    documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0] * 12])
    with torch.no_grad():
        together = model(tokens, documents=documents)
        alone = torch.cat([model(part) for part in tokens[:1].split([5, 4, 3], dim=1)], dim=1)
        torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together[1:], model(tokens[1:]), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(together[:1], model(tokens[:1]), atol=1e-2)


def test_under_bf16_norms_rotation_and_loss_are_computed_in_fp32():
    model = build(norm="rms_norm").to(torch.bfloat16)
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide, weight = x.float(), model.norm.weight.float()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight
    assert torch.equal(model.norm(x), expected.bfloat16())

    q = torch.randn(1, 2, 12, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    cos, sin = rope_tables(torch.arange(1000, 1012), model.config)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(rotate(q, cos, sin), rotate(q.float(), cos, sin).bfloat16())
    assert model(ids(), ids()).dtype == torch.float32
