"""Adapters compute what PEFT's compute, and start as their base.

The oracles are peft on transformers' models, in fp64, and the merged plain model. test_adapter_runs.py has the runs.
"""

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft.optimizers import create_loraplus_optimizer
from ranks import on_ranks
from references.random_models import FALCON, GEMMA, LLAMA, OLMO, OLMO2, random_weights
from runs import first_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from olmo_train.convert import families
from olmo_train.model.adapter import AdaptedLinear, adapt, adapted_linears, first_values, is_adapter, merged, row_norms
from olmo_train.model.config import AdapterConfig, ModelConfig
from olmo_train.model.cost import adapter_parameters, count_parameters, flops_per_token, matrix_parameters
from olmo_train.model.transformer import Transformer
from olmo_train.optim.build import build_optimizer, set_lr
from olmo_train.optim.config import OptimConfig
from olmo_train.optim.groups import Scaling
from olmo_train.parallel import shard
from olmo_train.parallel.config import ParallelConfig
from olmo_train.parallel.recompute import training_forward

SMOLLM2 = ModelConfig(
    d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, mlp_hidden=1536, vocab_size=49152, padded_vocab_size=49152,
    norm="rms_norm", tie_embeddings=True,
)  # fmt: skip
KINDS = pytest.mark.parametrize("kind", ["lora", "dora"])


def with_values(model: Transformer, adapter: AdapterConfig, random: bool = True) -> Transformer:
    """The model with adapters at their first values, or at random ones that change what it computes."""
    adapt(model, adapter).to(next(model.parameters()).dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, module in adapted_linears(model):
            for key, value in first_values(name, module, module.weight, seed=1).items():
                parameter = getattr(module.adapter, key)
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                if random:
                    value = value * (1 + 0.03 * noise) if key == "magnitude" else 0.1 * noise
                parameter.copy_(value)
    return model


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# ---- the formulas, beside PEFT


@KINDS
@pytest.mark.parametrize("stabilized", [False, True])
def test_a_linear_equals_peft_through_three_steps_of_lora_plus(kind, stabilized):
    """Also create_loraplus_optimizer, whose fast group has B and the magnitudes."""
    torch.manual_seed(1)
    config = AdapterConfig(kind, rank=4, alpha=16, rank_stabilized=stabilized, lr_ratio=16)
    base = nn.Linear(12, 20, bias=False).double()
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(12, 20, bias=False)).double(),
        peft.LoraConfig(r=4, lora_alpha=16, target_modules=["0"], use_dora=kind == "dora", use_rslora=stabilized),
    ).double()
    ours = AdaptedLinear(base.requires_grad_(False), config).double()
    layer = theirs.base_model.model[0]
    layer.base_layer.weight.data.copy_(base.weight)
    pairs = {"lora_a": layer.lora_A.default.weight, "lora_b": layer.lora_B.default.weight}
    if kind == "dora":
        pairs["magnitude"] = layer.lora_magnitude_vector.default.weight
    for key, parameter in pairs.items():
        value = row_norms(base.weight, torch.zeros(4, 12).double(), torch.zeros(20, 4).double(), 1) if key == "magnitude" else 0
        parameter.data.copy_(value + 0.2 * torch.randn_like(parameter))
        getattr(ours.adapter, key).data.copy_(parameter)
    before = {key: parameter.detach().clone() for key, parameter in pairs.items()}

    named = {f"blocks.0.attn.wq.{name}": parameter for name, parameter in ours.named_parameters()}
    recipe = OptimConfig(peak_lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    optimizer = build_optimizer(named, recipe, scaling=Scaling(config.lr_ratio))
    set_lr(optimizer, 1e-3)
    reference = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, eps=1e-8)
    for _ in range(3):
        x = torch.randn(5, 12).double()
        for model in (ours, theirs):
            model.zero_grad()
            model(x).square().mean().backward()
        assert all(relative(getattr(ours.adapter, key).grad, p.grad) <= 1e-12 for key, p in pairs.items())
        optimizer.step()
        reference.step()
    for key, parameter in pairs.items():
        assert relative(getattr(ours.adapter, key) - before[key], parameter - before[key]) <= 1e-10


def peft_of(config: ModelConfig, model: Transformer, adapter: AdapterConfig):
    """peft's model with the base weights and the adapters of ours, and {our name: its parameter}."""
    family = families.family_of(config)
    settings = families.to_settings(family, config, None, None, "float32")
    about = transformers.AutoConfig.for_model(**settings)
    base = transformers.AutoModelForCausalLM.from_config(about).double()
    weights = dict(model.named_parameters())
    names, state = {}, {}
    for mapping in families.mappings(family, config):
        state[mapping.theirs] = mapping.join([weights[name].detach() for name in mapping.ours])
        names |= {name: mapping.theirs for name in mapping.ours}
    base.load_state_dict(state, strict=False)
    base.tie_weights()
    targets = {names[f"{name}.weight"].removesuffix(".weight").rpartition(".")[2] for name, _ in adapted_linears(model)}
    theirs = peft.get_peft_model(base, peft.LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=sorted(targets), use_dora=adapter.kind == "dora"
    )).double()  # fmt: skip
    found = {}
    for name, module in adapted_linears(model):
        layer = theirs.base_model.model.get_submodule(names[f"{name}.weight"].removesuffix(".weight"))
        parts = {"lora_a": layer.lora_A.default.weight, "lora_b": layer.lora_B.default.weight}
        if adapter.kind == "dora":
            parts["magnitude"] = layer.lora_magnitude_vector.default.weight
        for key, parameter in parts.items():
            parameter.data.copy_(getattr(module.adapter, key))
            found[f"{name}.adapter.{key}"] = parameter
    return theirs, found


@KINDS
@pytest.mark.parametrize("shape", [OLMO, OLMO2, LLAMA, GEMMA, FALCON], ids=families.FAMILIES.keys())
def test_five_families_equal_peft_in_logits_gradients_and_three_steps(shape, kind):
    """Falcon stores q, k and v as one matrix, which has one A there, so its q, k and v have no adapters here."""
    config = ModelConfig(**shape)
    targets = ("wo", "w_up", "w_down") if shape is FALCON else AdapterConfig().targets
    adapter = AdapterConfig(kind, rank=4, alpha=16, targets=targets)
    plain = Transformer(config).double()
    plain.load_state_dict(random_weights(config))  # with first values attention is so even that q and k have no gradient
    ours = with_values(plain, adapter)
    theirs, pairs = peft_of(config, ours, adapter)
    mine = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert mine.keys() == pairs.keys() and len(pairs) == sum(p.requires_grad for p in theirs.parameters())
    ids = torch.randint(400, (2, 24), generator=torch.Generator().manual_seed(1))
    assert relative(ours(ids), theirs(ids).logits) <= 1e-6
    optimizers = [torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0) for parameters in (mine.values(), pairs.values())]
    for _ in range(3):
        for model, logits in ((ours, lambda: ours(ids)), (theirs, lambda: theirs(ids).logits)):
            model.zero_grad()
            F.cross_entropy(logits()[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        assert max(relative(mine[name].grad, pairs[name].grad) for name in mine) <= 5e-6
        for optimizer in optimizers:
            optimizer.step()
    assert max(relative(mine[name], pairs[name]) for name in mine) <= 1e-6


@KINDS
def test_merged_weights_compute_what_adapters_compute(kind):
    config, adapter = ModelConfig(**LLAMA), AdapterConfig(kind, rank=4, alpha=16)
    model = with_values(first_model(config), adapter)
    plain = first_model(config)
    with torch.no_grad():
        for name, module in adapted_linears(model):
            values = dict(module.adapter.named_parameters())
            plain.get_submodule(name).weight.copy_(merged(module.weight, values, module.adapter.scale))
        ids = torch.arange(40).view(2, 20)
        assert relative(plain(ids), model(ids)) <= 1e-5
        assert relative(first_model(config)(ids), model(ids)) > 1e-2


def test_a_row_of_zeros_stays_finite_and_is_that_of_lora_as_long_as_its_norm_is_zero():
    linear = nn.Linear(6, 5, bias=False)
    linear.weight.data[2] = 0
    module = AdaptedLinear(linear, AdapterConfig("dora", rank=2))
    for key, value in first_values("blocks.0.attn.wo", module, linear.weight, 1).items():
        getattr(module.adapter, key).data.copy_(value)
    x = torch.randn(3, 6)
    y = module(x)
    y.sum().backward()
    assert torch.equal(y, F.linear(x, linear.weight))
    assert all(parameter.grad.isfinite().all() for parameter in module.adapter.parameters())
    assert module.adapter.lora_b.grad[2].norm() > 0


def test_the_counts_of_trained_parameters_and_flops():
    lora = AdapterConfig("lora")
    assert (adapter_parameters(SMOLLM2, lora), count_parameters(SMOLLM2).total) == (2_442_240, 134_515_008)
    for kind in ("lora", "dora"):
        config, adapter = ModelConfig(**LLAMA), AdapterConfig(kind, rank=4, targets=("wq", "wv", "w_down"))
        model = adapt(first_model(config), adapter)
        assert adapter_parameters(config, adapter) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = flops_per_token(SMOLLM2) - flops_per_token(SMOLLM2, adapter=lora)
    assert saved == 2 * matrix_parameters(SMOLLM2) - 6 * 2_442_240


class Products(TorchDispatchMode):
    """Collects the names of operations, and the shapes of the results of matrix products."""

    def __init__(self):
        super().__init__()
        self.names, self.shapes = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(str(function))
        if "mm" in str(function):
            self.shapes.add(tuple(result.shape))
        return result


@KINDS
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_no_product_has_the_size_of_a_frozen_weight(kind, checkpointing):
    """It would be a gradient that nobody needs, or B A, which selective checkpointing would keep for every matrix."""
    config = ModelConfig(
        d_model=32, n_layers=2, n_heads=2, mlp_hidden=48, vocab_size=80, padded_vocab_size=80, seq_len=27
    )  # fmt: skip
    model = with_values(first_model(config), AdapterConfig(kind, rank=4))
    for block in model.blocks:
        block.forward = training_forward(block.forward, checkpointing, compiled=False)
    ids = torch.arange(54).view(2, 27)
    with Products() as seen:
        model(ids, ids).sum().backward()
    frozen = {tuple(p.shape) for name, p in model.named_parameters() if not is_adapter(name)}
    assert {(54, 48), (54, 80), (4, 32), (48, 4)} <= seen.shapes, "what was watched"
    assert not seen.shapes & (frozen | {shape[::-1] for shape in frozen})
    assert "aten.embedding_dense_backward.default" not in seen.names
    assert all((p.grad is None) != is_adapter(name) for name, p in model.named_parameters())


# ---- sharded


def same_as_base(world, precision: str, kind: str) -> bool:
    """Whether the sharded model with new adapters computes the logits of the plain base, bit for bit."""
    config, adapter = ModelConfig(**LLAMA), AdapterConfig(kind, rank=4)
    base, ids = first_model(config), torch.arange(40).view(2, 20)
    with torch.device("meta"):
        model = adapt(Transformer(config), adapter)
    shard.shard(model, ParallelConfig(precision=precision, cpu_kernels=False), world)
    types = {is_adapter(name): parameter.dtype for name, parameter in model.named_parameters()}
    assert types == {True: torch.float32, False: shard.DTYPES[precision]}
    with torch.no_grad():
        for name, value in base.named_parameters():
            parameter = dict(model.named_parameters())[name]
            parts = torch.distributed.tensor.distribute_tensor(
                value.to(parameter.dtype), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            parameter.copy_(parts)
    shard.init_adapters(model, 1)
    with torch.no_grad():
        return torch.equal(model(ids), base.to(shard.DTYPES[precision])(ids))


@pytest.mark.parametrize("size", [1, 2])
def test_a_model_with_new_adapters_is_its_base_bit_for_bit(size):
    cases = [(precision, kind) for precision in ("fp32", "bf16") for kind in ("lora", "dora")]
    assert on_ranks(size, lambda world: [same_as_base(world, *case) for case in cases]) == [[True] * 4] * size


def test_lora_plus_scales_the_rate_of_b_and_magnitudes_and_magnitudes_are_not_decayed():
    model = adapt(first_model(ModelConfig(**LLAMA)), AdapterConfig("dora", rank=2))
    optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig(weight_decay=0.1), scaling=Scaling(lr_ratio=16))
    set_lr(optimizer, 1.0)
    names = {id(parameter): name.rpartition(".")[2] for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert found == {"lora_a": (1.0, 0.1), "lora_b": (16.0, 0.1), "magnitude": (16.0, 0.0)}
