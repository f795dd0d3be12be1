"""OLMo's checkpoints and configuration files: names whatever wrapped the model, every option read or refused by name."""

import dataclasses
import json
import pickle

import pytest
import torch
from references import olmo_parity as parity
from references.random_models import OLMO, OLMO2, random_weights

from olmo_train import config
from olmo_train.checkpoint import folders, load
from olmo_train.convert import olmo
from olmo_train.errors import CheckpointError, ConfigError
from olmo_train.model.config import ModelConfig
from olmo_train.train_config import TrainConfig

SEVEN_B = {
    "run_name": "7B", "seed": 6198, "wandb": {"name": "${run_name}"},
    "model": {
        "d_model": 4096, "n_heads": 32, "n_layers": 32, "mlp_hidden_size": 22016, "weight_tying": False, "alibi": False,
        "rope": True, "flash_attention": True, "attention_dropout": 0.0, "attention_layer_norm": False,
        "multi_query_attention": False, "include_bias": False, "block_type": "sequential", "layer_norm_type": "default",
        "layer_norm_with_affine": False, "bias_for_layer_norm": False, "attention_layer_norm_with_affine": False,
        "activation_type": "swiglu", "residual_dropout": 0.0, "embedding_dropout": 0.0, "max_sequence_length": 2048,
        "vocab_size": 50280, "embedding_size": 50304, "eos_token_id": 50279, "pad_token_id": 1, "init_device": "meta",
        "init_fn": "mitchell",
    },
    "compile": {"fullgraph": False},
    "optimizer": {"name": "adamw", "learning_rate": 3e-4, "weight_decay": 0.1, "betas": [0.9, 0.95], "metrics_log_interval": 10},
    "scheduler": {"name": "linear_with_warmup", "t_warmup": 5000, "alpha_f": 0.1, "grad_clip_warmup_steps": 1000,
                  "grad_clip_warmup_factor": 10.0},
    "tokenizer": {"identifier": "any"}, "save_folder": "runs/${run_name}", "save_interval": 1000, "max_duration": "2e12T",
    "global_train_batch_size": 2048, "device_train_microbatch_size": 2, "precision": "amp_bf16",
    "fsdp": {"wrapping_strategy": "by_block", "precision": "mixed"}, "max_grad_norm": 1.0, "max_grad_norm_ratio": None,
    "eval_interval": "${save_interval}", "evaluators": [{"label": "piqa", "type": "downstream"}],
    "data": {"pad_direction": "right", "num_workers": 16, "drop_last": True, "paths": ["b.npy", "a.npy", "b.npy"]},
}  # fmt: skip
ONE_B = {"model": {"d_model": 2048, "n_heads": 16, "n_layers": 16, "mlp_hidden_size": None, "mlp_ratio": 8, "weight_tying": True},
         "optimizer": {"learning_rate": 4e-4}, "compile": None, "max_duration": 739_328, "device_train_microbatch_size": 8,
         "scheduler": {"name": "cosine_with_warmup", "t_warmup": 2000, "grad_clip_warmup_steps": None},
         "fsdp": {"precision": "mixed"}}  # fmt: skip
OLMO_0424 = {"model": {"clip_qkv": 8.0, "max_sequence_length": 4096}, "global_train_batch_size": 1024, "max_duration": "2ep",
             "optimizer": {"decay_norm_and_bias": True, "decay_embeddings": True}, "compile": None,
             "scheduler": {"name": "cosine_with_warmup", "units": "tokens", "t_warmup": 10485760000, "t_max": 3e12,
                           "grad_clip_warmup_steps": 2097152000, "grad_clip_warmup_factor": 5}}  # fmt: skip
OLMO_2 = {
    "model": {"rope_theta": 500000, "layer_norm_type": "rms", "layer_norm_with_affine": True, "layer_norm_eps": 1e-6,
              "attention_layer_norm": True, "attention_layer_norm_with_affine": True, "norm_after": True,
              "max_sequence_length": 4096, "vocab_size": 100278, "embedding_size": 100352, "eos_token_id": 100257,
              "init_fn": "normal", "init_std": 0.02, "init_cutoff_factor": 3},
    "softmax_auxiliary_loss": True, "auxiliary_loss_multiplier": 1e-5, "compile": None, "max_duration": "1ep",
    "global_train_batch_size": 1024, "optimizer": {"eps": 1e-8, "decay_norm_and_bias": True},
    "scheduler": {"name": "cosine_with_warmup", "units": "tokens", "t_warmup": 8388608000, "t_max": 5e12, "warmup_min_lr": 0.0,
                  "grad_clip_warmup_steps": None},
    "data": {"memmap_dtype": "uint32", "instance_filter": {"repetition_max_period": 13}},
}  # fmt: skip


def with_changes(changes: dict) -> dict:
    return SEVEN_B | {k: {**SEVEN_B.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()}


# ---- configuration files

RELEASED = {"olmo-7b": {"grad_clip_warmup_steps": 1000, "grad_clip_warmup_factor": 10.0}}  # not in the paper
SHIPPED = {"olmo-7b": {}, "olmo-1b": ONE_B, "olmo-7b-0424": OLMO_0424, "olmo2-7b": OLMO_2}


@pytest.mark.parametrize("name", SHIPPED)
def test_official_files_become_the_shipped_model_and_recipe(name, tmp_path):
    ours = olmo.read_settings(with_changes(SHIPPED[name]), left_out=["data.instance_filter"])
    (tmp_path / "ours.yaml").write_text(json.dumps(ours).replace("Infinity", ".inf"))
    translated = config.load(TrainConfig, [tmp_path / "ours.yaml"], [f"run_dir={tmp_path}"])
    shipped = config.load(TrainConfig, [parity.ROOT / f"configs/models/{name}.yaml"], ["run_dir=x", "data.sources.a.path=x"])
    assert translated.model == shipped.model
    assert translated.optim == dataclasses.replace(shipped.optim, **RELEASED.get(name, {}))
    assert (translated.steps, translated.global_batch_size) == (shipped.steps, shipped.global_batch_size)
    assert translated.parallel.reduce_dtype == "fp32" and translated.parallel.precision == "bf16"
    assert translated.loss_divisor == "all_tokens" and translated.data.order == "olmo"
    assert translated.data.sources["olmo"].path == ("b.npy", "a.npy", "b.npy")  # in their order, repeated as there


@pytest.mark.parametrize(
    "change, key",
    [
        ({"model": {"alibi": True}}, "model.alibi"),
        ({"model": {"rope": False}}, "model.rope"),
        ({"model": {"include_bias": True}}, "model.include_bias"),
        ({"model": {"block_type": "llama"}}, "model.block_type"),
        ({"model": {"residual_dropout": 0.1}}, "model.residual_dropout"),
        ({"model": {"init_fn": "full_megatron"}}, "model.init_fn"),
        ({"model": {"init_fn": "normal"}}, "model.init_cutoff_factor"),
        ({"model": {"layer_norm_type": "rms"}}, "model.layer_norm_type"),
        ({"model": {"activation_type": "relu"}}, "model.activation_type"),
        ({"model": {"new_option": 1}}, "model.new_option"),
        ({"optimizer": {"name": "lionw"}}, "optimizer.name"),
        ({"scheduler": {"name": "cosine_linear_envelope"}}, "scheduler.name"),
        ({"data": {"instance_filter": {}}}, "data.instance_filter"),
        ({"data": {"drop_last": False}}, "data.drop_last"),
        ({"max_grad_norm_ratio": 2.0}, "max_grad_norm_ratio"),
        ({"max_duration": "1ep"}, "max_duration"),
        ({"precision": "amp_fp16"}, "precision"),
        ({"fast_forward_batches": 5}, "fast_forward_batches"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_an_option_that_we_do_not_have_is_refused_by_name(change, key):
    with pytest.raises(ConfigError) as problem:
        olmo.read_settings(with_changes(change))
    assert problem.value.where == key


def test_a_file_that_leaves_keys_out_means_olmos_defaults():
    """ai2-olmo's default is a GPT-2 with biases, dropout and LION: none of it may become ours in silence."""
    with pytest.raises(ConfigError):
        olmo.read_settings({"model": {}})


def test_train_accepts_a_translated_file(tmp_path, tiny_tokens, run_main):
    tiny = {**parity.RUN, "max_duration": 2, "model": parity.MODEL, "save_folder": "${path.choose:${oc.env:NOWHERE,x}/a,/b}"}
    (tmp_path / "olmo.yaml").write_text(json.dumps(tiny | {"data": {"drop_last": True, "paths": [str(tiny_tokens)]}}))
    assert run_main("convert", "import-olmo", "olmo.yaml", "ours.yaml").returncode == 0
    out = run_main("train", "ours.yaml", "run_dir=run", "log.wandb.mode=disabled")
    assert out.returncode == 0, out.stderr
    (tmp_path / "olmo.yaml").write_text(json.dumps(tiny | {"max_grad_norm_ratio": 2.0}))
    out = run_main("convert", "import-olmo", "olmo.yaml", "other.yaml")
    assert out.returncode == 2 and out.stderr.splitlines()[-1].startswith("error: max_grad_norm_ratio: 2.0 cannot be expressed")


# ---- checkpoints

SETTINGS = {**parity.RUN, "data": {"drop_last": True}}


def their_checkpoint(folder, shape: dict, model: dict, rename=lambda name: name, moments: bool = False):
    """A folder as OLMo writes it, with random weights; returns ours by our names."""
    weights = random_weights(ModelConfig(**shape))
    theirs = {rename(name): value for name, value in parity.their_names(weights).items()}
    folder.mkdir()
    torch.save(theirs, folder / "model.pt")
    if moments:
        state = {
            name: {"step": torch.tensor(70.0), "exp_avg": value * 2, "exp_avg_sq": value**2} for name, value in theirs.items()
        }
        torch.save(
            {"state": state, "param_groups": [{"params": list(state), "param_names": list(state), "lr": 1e-3}]},
            folder / "optim.pt",
        )
    settings = SETTINGS | {"model": parity.MODEL | {"max_sequence_length": 80} | model}
    (folder / "config.yaml").write_text(json.dumps(settings))
    return weights


GQA = {"n_kv_heads": 2, "tie_embeddings": True}
AFFINE = {"layer_norm_type": "rms", "layer_norm_with_affine": True, "layer_norm_eps": 1e-6, "attention_layer_norm": True,
          "attention_layer_norm_with_affine": True, "norm_after": True, "rope_theta": 500000}  # fmt: skip


def in_groups_of_two(name: str) -> str:
    return name.replace(".blocks.0.", ".block_groups.0.0.").replace(".blocks.1.", ".block_groups.0.1.").replace(
        ".blocks.2.", ".block_groups.1.0.").replace(".blocks.3.", ".block_groups.1.1.")  # fmt: skip


@pytest.mark.parametrize(
    "shape, model, rename",
    [
        ({}, {}, lambda name: name),
        (GQA, {"n_kv_heads": 2, "weight_tying": True}, lambda name: f"module.{name}"),
        ({}, {}, lambda name: f"_fsdp_wrapped_module.{name.replace('.att_proj', '._fsdp_wrapped_module.att_proj')}"),
        ({"n_layers": 4}, {"n_layers": 4, "block_group_size": 2}, in_groups_of_two),
    ],
    ids=["plain", "DDP, tied, GQA", "FSDP", "block groups"],
)
def test_weights_arrive_whatever_wrapped_the_model(tmp_path, shape, model, rename):
    weights = their_checkpoint(tmp_path / "step50-unsharded", OLMO | shape, model, rename)
    assert olmo.import_olmo(tmp_path / "step50-unsharded", tmp_path / "ours") == 50
    ours = dict(load.load_model(tmp_path / "ours").named_parameters())
    assert ours.keys() == weights.keys() and all(torch.equal(ours[name], weights[name]) for name in weights)


def test_norms_of_olmo2_arrive_in_their_places(tmp_path):
    weights = their_checkpoint(tmp_path / "theirs", OLMO2, AFFINE | {"init_fn": "normal", "init_cutoff_factor": 3.0})
    olmo.import_olmo(tmp_path / "theirs", tmp_path / "ours")
    model = load.load_model(tmp_path / "ours")
    assert model.config == ModelConfig(**OLMO2)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_moments_and_step_come_along(tmp_path):
    weights = their_checkpoint(tmp_path / "theirs", OLMO, {}, moments=True)
    assert olmo.import_olmo(tmp_path / "theirs", tmp_path / "ours") == 70
    assert folders.read_state(tmp_path / "ours")["optimizer_steps"] == 70
    assert olmo.import_olmo(tmp_path / "theirs", tmp_path / "later", step=90) == 90
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "ours/model.safetensors")
    for name, value in weights.items():
        assert torch.equal(stored[f"optim.{name}.exp_avg"], value * 2)
        assert torch.equal(stored[f"optim.{name}.exp_avg_sq"], value**2)


def test_a_pickle_that_runs_code_is_not_opened(tmp_path):
    their_checkpoint(tmp_path / "theirs", OLMO, {})
    for content in (pickle.dumps(Evil()), b"nothing of the kind"):
        (tmp_path / "theirs/model.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be opened"):
            olmo.import_olmo(tmp_path / "theirs", tmp_path / "ours")
    torch.save({"transformer.wte.weight": Evil()}, tmp_path / "theirs/model.pt")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        olmo.import_olmo(tmp_path / "theirs", tmp_path / "ours")
    assert not Evil.ran


class Evil:
    ran = False

    def __reduce__(self):
        return setattr, (Evil, "ran", True)


def test_weights_that_do_not_fit_are_named(tmp_path):
    their_checkpoint(tmp_path / "theirs", OLMO, {})
    settings = json.loads((tmp_path / "theirs/config.yaml").read_text())
    for key, value, problem in (
        ("mlp_hidden_size", 200, r"blocks.0.ff_proj.weight is \(192, 64\), expected \(200, 64\)"),
        ("weight_tying", True, r"transformer.ff_out.weight is \(512, 64\), expected absent"),
    ):
        changed = settings | {"model": settings["model"] | {key: value}}
        (tmp_path / "theirs/config.yaml").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=problem):
            olmo.import_olmo(tmp_path / "theirs", tmp_path / "ours")
    torch.save({"transformer.blocks.0.mixer.weight": torch.zeros(2)}, tmp_path / "theirs/model.pt")
    with pytest.raises(CheckpointError, match=r"transformer.blocks.0.mixer.weight is \(2,\), expected absent"):
        olmo.import_olmo(tmp_path / "theirs", tmp_path / "ours")
    (tmp_path / "theirs/model.pt").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model.pt"):
        olmo.import_olmo(tmp_path / "theirs", tmp_path / "ours")
