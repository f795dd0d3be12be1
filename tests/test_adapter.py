"""Adapters compute what PEFT's compute, start as their base, and are all that a run trains, saves and resumes.

The oracles are peft on transformers' models, in fp64, and the merged plain model.
"""

import json
import shutil
from pathlib import Path

import conftest
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft.optimizers import create_loraplus_optimizer
from ranks import on_ranks
from references.random_models import FALCON, GEMMA, LLAMA, OLMO, OLMO2, random_weights
from runs import LOSS, cut, events_of, first_model, history, lines_of, trained
from torch import nn

from olmo_train import config as configuration
from olmo_train import train as training
from olmo_train.checkpoint import folders
from olmo_train.checkpoint.load import load_model
from olmo_train.convert import families
from olmo_train.errors import CheckpointError, ConfigError
from olmo_train.model.adapter import AdaptedLinear, adapt, adapted_linears, first_values, is_adapter, merged, row_norms
from olmo_train.model.config import AdapterConfig, ModelConfig
from olmo_train.model.cost import adapter_parameters, count_parameters, flops_per_token, matrix_parameters
from olmo_train.model.transformer import Transformer
from olmo_train.optim.build import build_optimizer, set_lr
from olmo_train.optim.config import OptimConfig
from olmo_train.parallel import shard
from olmo_train.parallel.config import ParallelConfig
from olmo_train.storage import hash_file
from olmo_train.train_config import TrainConfig

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
    optimizer = build_optimizer(named, recipe, lr_ratio=config.lr_ratio)
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


@pytest.fixture(scope="module")
def base(tmp_path_factory, stream):
    """The run_dir of a short run, whose checkpoint is the base; beside it the tokens."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "tokens.npy").write_bytes(stream)
    words = conftest.words_of(folder / "run", folder / "tokens.npy", total_steps=2, **{"optim.warmup_steps": 1})
    return Path(trained(configuration.load(TrainConfig, [], words)).run_dir)


@pytest.fixture
def adapter_args(tiny_args, base):
    """adapter_args(name, kind, **changes): the configuration of a run of 4 steps that adapts the base."""

    def args(name: str, kind: str = "lora", **changes):
        values = {"total_steps": 4, "optim.warmup_steps": 1, "adapter.kind": kind, "adapter.rank": 4, "init_from": base}
        return tiny_args(name, **values | changes)

    return args


def adapters_of(run_dir) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint of a run of one process."""
    from safetensors.torch import load_file

    (file,) = folders.newest_folder(Path(run_dir)).glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("checkpointing, kind", [("none", "lora"), ("none", "dora"), ("selective", "dora"), ("full", "lora"),
                                                 ("full", "dora")])  # fmt: skip
def test_every_adapter_moves_within_two_steps_and_the_frozen_weights_stay(adapter_args, base, checkpointing, kind, monkeypatch):
    frozen, state = {}, []
    ordinary = training.train_step

    def train_step(model, optimizer, *others):
        stats = ordinary(model, optimizer, *others)
        frozen.update({name: p.full_tensor() for name, p in model.named_parameters() if not is_adapter(name)})
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        state[:] = [names[id(parameter)] for parameter in optimizer.state]
        return stats

    monkeypatch.setattr(training, "train_step", train_step)
    changes = {"parallel.activation_checkpointing": checkpointing, "checkpoint.save_steps": "[0]", "total_steps": 2}
    config = trained(adapter_args("run", kind, **changes))
    plain = dict(load_model(base).named_parameters())
    assert frozen.keys() == plain.keys() and all(torch.equal(frozen[name], plain[name]) for name in plain)
    after = adapters_of(config.run_dir)
    shutil.rmtree(folders.newest_folder(Path(config.run_dir)))
    before = adapters_of(config.run_dir)
    parameters = {name for name in after if name.startswith("model.")}
    assert {f"model.{name}" for name in state} == parameters and len(parameters) == 2 * 7 * (3 if kind == "dora" else 2)
    assert all((after[name] - before[name]).abs().max() > 0 for name in parameters)


def test_processes_micro_batches_and_worlds_train_the_same_adapters(adapter_args):
    def run(world, name, **changes):
        config = adapter_args(f"{name}-{world.size}", "dora", total_steps=3, **changes)
        trained(config, world)
        return history(config.run_dir, LOSS) if world.is_main else None

    deterministic = {"determinism": "world", "micro_batch_size": 1}
    one = on_ranks(1, lambda world: [run(world, "a"), run(world, "b", micro_batch_size=1), run(world, "w", **deterministic)])[0]
    two = on_ranks(2, lambda world: [run(world, "a"), run(world, "w", **deterministic)])[0]
    four = on_ranks(4, lambda world: [run(world, "a", micro_batch_size=2)])[0]
    for losses in (one[1], two[0], four[0]):
        assert [loss for (loss,) in losses] == pytest.approx([loss for (loss,) in one[0]], rel=1e-6)
    assert two[1] == one[2]


def test_a_compiled_block_with_adapters_computes_the_same(adapter_args):
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    changes = {"total_steps": 2, "parallel.cpu_kernels": "false"}
    plain, compiled = (
        trained(adapter_args(f"{way}", "dora", **changes, **{"parallel.compile": way})) for way in ("false", "true")
    )
    expected = [loss for (loss,) in history(plain.run_dir, LOSS)]
    assert [loss for (loss,) in history(compiled.run_dir, LOSS)] == pytest.approx(expected, rel=1e-5)


def test_a_frozen_weight_that_differs_between_replicas_is_found(adapter_args, monkeypatch):
    """The check of a run compares frozen weights too: no update would ever overwrite a flipped bit."""
    seen = {}
    monkeypatch.setattr("olmo_train.run.run.divergence", lambda tensors, *rest: seen.update(tensors) or None)
    trained(adapter_args("run", total_steps=1, **{"guards.replica_check_steps": 1}))
    names = set(seen)
    assert {"model.embed.weight", "model.blocks.1.mlp.w_down.weight"} <= names
    assert {"model.blocks.1.mlp.w_down.adapter.lora_a", "optim.blocks.1.mlp.w_down.adapter.lora_a.exp_avg"} <= names


# ---- checkpoints


@KINDS
def test_a_resumed_run_has_the_bits_of_one_that_was_not_cut(adapter_args, kind):
    changes = {"checkpoint.interval_steps": 2}
    whole = trained(adapter_args("whole", kind, **changes))
    resumed = trained(cut(adapter_args("cut", kind, **changes), 2))
    assert history(whole.run_dir) == history(resumed.run_dir)
    assert [event["step"] for event in events_of(resumed.run_dir, "resume")] == [2]
    first, second = adapters_of(whole.run_dir), adapters_of(resumed.run_dir)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The run_dir of a finished run with DoRA in bf16."""
    words = {"total_steps": 2, "adapter.kind": "dora", "adapter.rank": 4, "init_from": base, "optim.peak_lr": 0.1,
             "parallel.precision": "bf16", "optim.warmup_steps": 1}  # fmt: skip
    folder = tmp_path_factory.mktemp("adapted")
    words = conftest.words_of(folder / "run", base.parent / "tokens.npy", **words)
    return Path(trained(configuration.load(TrainConfig, [], words)).run_dir)


def test_a_checkpoint_holds_adapters_and_names_its_base(finished, base):
    folder, plain = folders.newest_folder(finished), folders.newest_folder(base)
    record = folders.read_state(folder)["base"]
    assert record == {
        "path": str(plain),
        "step": 2,
        "manifest_sha256": folders.hash_file(plain / "MANIFEST.json"),
        "dtype": "bf16",
    }
    tensors = adapters_of(finished)
    assert all(".adapter." in name for name in tensors) and {t.dtype for t in tensors.values()} == {torch.float32}
    n_trained = sum(t.numel() for name, t in tensors.items() if name.startswith("model."))
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12 * n_trained + 1e6
    assert next(folder.glob("*.safetensors")).stat().st_size <= 12 * n_trained + 50_000


def test_load_model_merges_what_was_trained(finished, base):
    """Into the weights as they were trained with, rounded to bf16."""
    config, adapter = load_model(base).config, AdapterConfig("dora", rank=4)
    model = adapt(load_model(base).bfloat16().float(), adapter)
    tensors = adapters_of(finished)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(tensors[f"model.{name}"])
        ids = torch.arange(40).view(2, 20)
        plain = load_model(finished)
        assert plain.config == config and not any(is_adapter(name) for name, _ in plain.named_parameters())
        assert relative(plain(ids), model(ids)) <= 1e-5 < 1e-2 < relative(load_model(base)(ids), model(ids))


def test_a_moved_base_is_found_by_init_from_and_another_one_refused(adapter_args, base, tmp_path):
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(base, moved)
    args = lambda **changes: adapter_args("run", **{"checkpoint.interval_steps": 2, "init_from": moved} | changes)  # noqa: E731
    trained(args(total_steps=2, **{"optim.schedule_steps": 4}))
    shutil.copytree(moved, other)
    state = folders.newest_folder(other) / "state.json"
    state.write_text(state.read_text() + "\n")
    manifest = state.parent / "MANIFEST.json"
    entries = json.loads(manifest.read_text())
    entries["files"]["state.json"] = {"size": state.stat().st_size, "sha256": hash_file(state)}
    manifest.write_text(json.dumps(entries))
    shutil.rmtree(moved)
    longer = {"total_steps": 3, "optim.schedule_steps": 4}
    with pytest.raises(ConfigError, match="where it was when the adapters were trained; put it back") as problem:
        trained(args(**longer))
    assert problem.value.where == "init_from"
    with pytest.raises(ConfigError, match="is not the checkpoint whose weights are frozen") as problem:
        trained(args(**longer, init_from=other))
    assert problem.value.where == "init_from"
    with pytest.raises(ConfigError, match="where it was"):
        load_model(tmp_path / "run")
    trained(args(**longer, init_from=base))
    load_model(tmp_path / "run")


def test_a_branch_continues_the_adapters_and_another_kind_is_refused(adapter_args, finished, base):
    with pytest.raises(ConfigError, match="is lora, and .* holds no adapters") as problem:
        trained(adapter_args("of-base", init_from=None, resume_from=base))
    assert problem.value.where == "adapter.kind"
    with pytest.raises(ConfigError, match="is none, and .* holds adapters"):
        trained(
            adapter_args("to-none", **{"adapter.kind": "none", "adapter.rank": None, "init_from": None, "resume_from": finished})
        )
    with pytest.raises(ConfigError, match="holds adapters alone; merge them"):
        trained(adapter_args("stacked", init_from=finished))
    with pytest.raises(CheckpointError, match="lora_a is .*, expected"):
        trained(adapter_args("wider", "dora", init_from=None, resume_from=finished, **{"adapter.rank": 5}))
    branch = adapter_args("branch", "dora", init_from=base, resume_from=finished, **{"parallel.precision": "bf16"})
    trained(branch)
    assert [line["step"] for line in lines_of(branch.run_dir)] == [3, 4]


# ---- mistakes


@pytest.mark.parametrize(
    "words, key, what",
    [
        ({"adapter.kind": "qlora"}, "adapter.kind", "needs kernels for 4-bit weights"),
        ({"adapter.kind": "dpo"}, "adapter.kind", "pairs of answers"),
        ({"dpo.beta": 0.1}, "dpo", "pairs of answers"),
        ({"adapter.dropout": 0.05}, "adapter.dropout", "random numbers"),
        ({"adapter.targets": "[wq,embed]"}, "adapter.targets.1", "tied head shares its weights"),
        ({"adapter.targets": "[head]"}, "adapter.targets.0", "is the embedding"),
        ({"adapter.targets": "[wz]"}, "adapter.targets.0", "is not a choice"),
        ({"adapter.targets": "[]"}, "adapter.targets", "is empty"),
        ({"adapter.targets": "[w_gate]", "model.activation": "gelu"}, "adapter.targets", "no gate"),
        ({"adapter.rank": 0}, "adapter.rank", "at least 1"),
        ({"adapter.rank": 65}, "adapter.rank", "65 is above the smallest side of wq, which is 64 x 64; set at most 64"),
        ({"adapter.alpha": 0}, "adapter.alpha", "above 0"),
        ({"adapter.lr_ratio": 0.5}, "adapter.lr_ratio", "at least 1"),
        ({"adapter.kind": "none", "adapter.lr_ratio": 16}, "adapter.lr_ratio", "needs adapter.kind lora or dora"),
        ({"parallel.float8": "true"}, "parallel.float8", "leave it out"),
        ({"optim.name": "muon"}, "optim.name", "set adamw"),
    ],
)
def test_a_mistake_is_named_with_its_key_and_remedy(tiny_args, words, key, what):
    with pytest.raises(ConfigError, match=what) as problem:
        tiny_args("run", **{"adapter.kind": "lora", "init_from": "base"} | words)
    assert problem.value.where == key


def test_adapters_without_a_base_and_a_base_of_another_shape_are_refused(adapter_args):
    with pytest.raises(ConfigError, match="lora needs weights to freeze; set init_from") as problem:
        trained(adapter_args("run", init_from=None))
    assert problem.value.where == "adapter.kind"
    with pytest.raises(CheckpointError, match=r"blocks\.\d.*expected"):
        trained(adapter_args("run", **{"model.mlp_hidden": 160}))


def test_a_resumed_run_may_not_change_its_adapters(adapter_args):
    trained(adapter_args("run", total_steps=2))
    for key, value in {"adapter.rank": 5, "adapter.alpha": 8, "adapter.kind": "dora", "adapter.lr_ratio": 2}.items():
        with pytest.raises(ConfigError, match=f"{key} is|is {value}|'dora'") as problem:
            trained(adapter_args("run", **{key: value, "allow_changes": "[adapter.rank,adapter.kind]"}))
        assert problem.value.where == key


def test_rows_of_zeros_are_counted_in_a_warning(adapter_args, monkeypatch, caplog):
    real = shard.init_adapters

    def zeroed(model, seed):
        with torch.no_grad():
            model.blocks[1].attn.wo.weight.to_local()[:3] = 0
        return real(model, seed)

    monkeypatch.setattr(shard, "init_adapters", zeroed)
    trained(adapter_args("run", "dora", total_steps=1))
    assert "3 rows of the adapted weights are zero: DoRA's m / |V| is 1 there" in caplog.text


def test_lora_plus_scales_the_rate_of_b_and_magnitudes_and_magnitudes_are_not_decayed():
    model = adapt(first_model(ModelConfig(**LLAMA)), AdapterConfig("dora", rank=2))
    optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig(weight_decay=0.1), lr_ratio=16)
    set_lr(optimizer, 1.0)
    names = {id(parameter): name.rpartition(".")[2] for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert found == {"lora_a": (1.0, 0.1), "lora_b": (16.0, 0.1), "magnitude": (16.0, 0.0)}


def test_the_console_says_how_many_parameters_are_trained(adapter_args, capsys):
    trained(adapter_args("run", total_steps=1))
    assert "lora: 9,856 of 165,888 parameters are trained" in capsys.readouterr().out
