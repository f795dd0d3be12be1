"""Conversion to transformers and back: the same logits, the same text, and a refusal of everything else.

The oracle is transformers itself, loaded by its own from_pretrained.
"""

import dataclasses
import json
import re

import pytest
import safetensors.torch
import torch
import transformers
from references.random_models import FALCON, GEMMA, LLAMA, OLMO, OLMO2, VARIANTS, write_random_checkpoint
from runs import trained_on

from olmo_train.checkpoint import load
from olmo_train.convert import check, families, folders
from olmo_train.convert import hf as convert_hf
from olmo_train.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from olmo_train.errors import CheckpointError, ConfigError
from olmo_train.model.config import ModelConfig
from olmo_train.model.generate import generate

TOKENS = torch.randint(450, (2, 64), generator=torch.Generator().manual_seed(5))


def load_theirs(folder, **options):
    """transformers' model of a folder, which must have every weight that it needs and no other."""
    model, about = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not about["missing_keys"] and not about["unexpected_keys"] and not about["mismatched_keys"]
    return model.eval()


def differences(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    return (ours - theirs).abs().max().item(), ((ours - theirs).norm() / theirs.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("shape", VARIANTS.values(), ids=VARIANTS.keys())
def test_export_and_import_keep_logits_and_weights(tmp_path, shape):
    config = ModelConfig(**shape)
    weights = write_random_checkpoint(tmp_path / "ours", config)
    proof = convert_hf.export_hf(tmp_path / "ours", tmp_path / "theirs")
    assert proof.difference <= 2e-5 and proof.relative <= 5e-6
    theirs = load_theirs(tmp_path / "theirs")(TOKENS).logits
    difference, relative = differences(load.load_model(tmp_path / "ours")(TOKENS), theirs)
    assert difference <= 2e-5 and relative <= 5e-6

    proof = convert_hf.import_hf(tmp_path / "theirs", tmp_path / "back")
    assert proof.difference <= 2e-5 and proof.relative <= 5e-6
    back = load.load_model(tmp_path / "back")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in back.named_parameters())
    known = dataclasses.replace(config, vocab_size=config.vocab_rows)  # without a tokenizer every row counts as an id
    assert (back.config, back.config.kv_heads) == (dataclasses.replace(known, n_kv_heads=back.config.n_kv_heads), config.kv_heads)


# ---- the proof sees what it has to see


def swap_up_and_gate(mapping: families.Mapping) -> families.Mapping:
    other = {"w_gate": "w_up", "w_up": "w_gate"}
    return dataclasses.replace(mapping, ours=tuple(re.sub("w_gate|w_up", lambda m: other[m[0]], name) for name in mapping.ours))


def interleave_rope(mapping: families.Mapping) -> families.Mapping:
    """The layout of rows in which dimension 2i turns with 2i + 1."""
    if not mapping.ours[0].endswith("wq.weight"):
        return mapping
    rows = torch.arange(mapping.shape[0])
    rows[:16] = rows[:16].view(2, 8).T.flatten()  # within the first head
    return dataclasses.replace(mapping, order=rows)


@pytest.mark.parametrize(
    "shape, fault",
    [
        pytest.param(shape, fault, id=f"{family}-{fault.__name__}")
        for family, shape in zip(families.FAMILIES, [OLMO, OLMO2, LLAMA, GEMMA, FALCON], strict=True)
        for fault in (swap_up_and_gate, interleave_rope)
        if (family, fault) != ("falcon", swap_up_and_gate)  # its MLP has no gate
    ],
)
def test_a_wrong_layout_is_not_exported(tmp_path, monkeypatch, fault, shape):
    write_random_checkpoint(tmp_path / "ours", ModelConfig(**shape))
    right = families.mappings
    monkeypatch.setattr(families, "mappings", lambda name, config: [fault(mapping) for mapping in right(name, config)])
    with pytest.raises(CheckpointError, match="not converted: logits differ"):
        convert_hf.export_hf(tmp_path / "ours", tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize("key, value", [("eps", None), ("rope_theta", 9000.0)])
@pytest.mark.parametrize("shape", [OLMO, OLMO2, LLAMA, GEMMA, FALCON], ids=families.FAMILIES.keys())
def test_a_wrong_setting_is_not_exported(tmp_path, monkeypatch, key, value, shape):
    config = ModelConfig(**shape)
    write_random_checkpoint(tmp_path / "ours", config)
    right = families.to_settings
    wrong = dataclasses.replace(config, norm_eps=1e-3) if key == "eps" else dataclasses.replace(config, rope_theta=value)
    if key == "eps" and shape is OLMO:  # which has no key for it: so say that any eps may be exported
        fixed = {k: v for k, v in families.FAMILIES["olmo"].shape.items() if k != "norm_eps"}
        monkeypatch.setitem(families.FAMILIES, "olmo", dataclasses.replace(families.FAMILIES["olmo"], shape=fixed))
        write_random_checkpoint(tmp_path / "other", wrong)
        (tmp_path / "ours").rename(tmp_path / "first")
        (tmp_path / "other").rename(tmp_path / "ours")
    monkeypatch.setattr(families, "to_settings", lambda name, config, *rest: right(name, wrong, *rest))
    with pytest.raises(CheckpointError, match="not converted: logits differ"):
        convert_hf.export_hf(tmp_path / "ours", tmp_path / "theirs")


# ---- what cannot be expressed


@pytest.mark.parametrize(
    "shape, changes, key",
    [
        (OLMO, {"norm_eps": 1e-6}, "model.norm_eps"),
        (OLMO, {"head_dim": 32}, "model.head_dim"),
        (OLMO, {"embedding_scale": True}, "model.embedding_scale"),
        (OLMO2, {"clip_qkv": 8.0}, "model.clip_qkv"),
        (OLMO2, {"qk_norm": False}, "model.qk_norm"),
        (GEMMA, {"block": "parallel"}, "model.block"),
        (FALCON, {"bias": "none"}, "model.bias"),
        (FALCON, {"block": "sequential", "n_kv_heads": 2}, "model.n_kv_heads"),
        (LLAMA, {"n_heads": 3, "head_dim": 32}, "model.n_heads"),
    ],
)
def test_a_model_that_no_family_expresses_is_refused_by_key(shape, changes, key):
    with pytest.raises(ConfigError) as problem:
        families.family_of(ModelConfig(**(shape | changes)))
    assert problem.value.where == key


@pytest.fixture
def exported(tmp_path):
    write_random_checkpoint(tmp_path / "ours", ModelConfig(**(LLAMA | {"n_kv_heads": 2})))
    convert_hf.export_hf(tmp_path / "ours", tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters"),
        ({"model_type": "gpt2"}, "model_type"),
    ],
)
def test_a_setting_that_we_cannot_express_is_refused_by_key(exported, changes, key):
    settings = json.loads((exported / "config.json").read_text()) | changes
    (exported / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError) as problem:
        convert_hf.import_hf(exported, exported.parent / "back")
    assert problem.value.where == key
    assert not (exported.parent / "back").exists()


@pytest.mark.parametrize("theirs, where", [
    ({"alibi": True}, "alibi"), ({"bias": True}, "bias"),
    ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
])  # fmt: skip
def test_a_falcon_that_we_cannot_express_is_refused_by_key(theirs, where):
    settings = transformers.FalconConfig(hidden_size=64, num_attention_heads=4, **theirs).to_dict()
    with pytest.raises(ConfigError) as problem:
        families.to_config(settings)
    assert problem.value.where == where


def test_missing_foreign_and_misshapen_weights_are_named(exported):
    right = safetensors.torch.load_file(exported / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for wrong in (
        {key: value for key, value in right.items() if key != name},
        right | {name: right[name][:-1].contiguous()},
        right | {"model.layers.1.mlp.up_proj.bias": torch.zeros(96)},
    ):
        safetensors.torch.save_file(wrong, exported / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj"):
            convert_hf.import_hf(exported, exported.parent / "back")


def test_pickled_weights_are_not_opened(exported):
    (exported / "model.safetensors").rename(exported / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds no model.safetensors"):
        convert_hf.import_hf(exported, exported.parent / "back")


def test_a_folder_that_is_there_is_not_overwritten(exported):
    with pytest.raises(ConfigError, match="exists already"):
        convert_hf.export_hf(exported.parent / "ours", exported)


# ---- files


def test_large_models_go_through_many_files_both_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SHARD_BYTES", 50_000)
    weights = write_random_checkpoint(tmp_path / "ours", ModelConfig(**OLMO))
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    convert_hf.export_hf(tmp_path / "ours", tmp_path / "theirs")
    index = json.loads((tmp_path / "theirs/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * value.numel() for value in weights.values())
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "theirs").glob("*.safetensors")}
    load_theirs(tmp_path / "theirs")
    convert_hf.import_hf(tmp_path / "theirs", tmp_path / "back")
    back = load.load_model(tmp_path / "back")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in back.named_parameters())


def test_weights_saved_by_transformers_are_imported(exported, tmp_path):
    """Sharded by its own rules, in bf16, tied or not, without the settings that are its defaults."""
    model = transformers.AutoModelForCausalLM.from_pretrained(exported).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    convert_hf.import_hf(tmp_path / "saved", tmp_path / "back")
    ours, theirs = load.load_model(tmp_path / "back"), load_theirs(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        assert differences(ours(TOKENS), theirs(TOKENS).logits)[0] <= 2e-5


def test_bf16_halves_the_file_and_is_proven_against_the_rounded_weights(tmp_path):
    weights = write_random_checkpoint(tmp_path / "ours", ModelConfig(**OLMO))
    proof = convert_hf.export_hf(tmp_path / "ours", tmp_path / "theirs", dtype="bf16")
    assert proof.relative <= 5e-6
    saved = safetensors.torch.load_file(tmp_path / "theirs/model.safetensors")
    assert torch.equal(saved["lm_head.weight"], weights["head.weight"].bfloat16())
    assert load_theirs(tmp_path / "theirs").config.dtype in (torch.bfloat16, None)


def test_only_the_block_that_computes_has_its_weights(tmp_path):
    config = ModelConfig(**(OLMO | {"n_layers": 3}))
    weights = write_random_checkpoint(tmp_path / "ours", config)
    model, filled = folders.on_meta(config), []
    for block in model.blocks:
        block.attn.register_forward_hook(
            lambda *_: filled.append([not next(block.parameters()).is_meta for block in model.blocks])
        )
    check.load_when_needed(model, model.blocks, weights.__getitem__)
    with torch.no_grad():
        model(TOKENS)
    assert filled == [[True, False, False], [False, True, False], [False, False, True]]


# ---- text


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer(train_tokenizer(["the quick brown fox jumps over the lazy dog " * 20, "pack my box"], 300), file)
    return file


@pytest.mark.parametrize("shape", [OLMO, OLMO2, LLAMA, GEMMA, FALCON], ids=families.FAMILIES.keys())
def test_greedy_text_of_transformers_is_ours_over_64_tokens(tmp_path, tokenizer_file, shape):
    tokenizer = load_tokenizer(tokenizer_file)
    config = ModelConfig(**(shape | {"vocab_size": tokenizer.vocab_size, "padded_vocab_size": 384}))
    write_random_checkpoint(tmp_path / "ours", config, {"tokenizer.json": tokenizer_file.read_bytes()})
    convert_hf.export_hf(tmp_path / "ours", tmp_path / "theirs")
    theirs = load_theirs(tmp_path / "theirs")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    text = "the quick brown dog's box, naïve\n  and  more"
    prompt = tokenizer.encode(text)
    assert their_tokenizer(text)["input_ids"] == prompt and their_tokenizer.padding_side == "left"
    assert theirs.generation_config.suppress_tokens == list(range(tokenizer.vocab_size, 384))
    assert (their_tokenizer.eos_token_id, theirs.generation_config.eos_token_id) == (tokenizer.eos_id, tokenizer.eos_id)
    assert theirs.generation_config.pad_token_id == tokenizer.inner.token_to_id("<|padding|>")
    expected = generate(load.load_model(tmp_path / "ours"), [prompt[:16]], 64, eos_id=tokenizer.eos_id)[0]
    got = theirs.generate(torch.tensor([prompt[:16]]), do_sample=False, max_new_tokens=64)[0, 16:]
    assert got.tolist() == expected
    back = convert_hf.import_hf(tmp_path / "theirs", tmp_path / "back") and load.load_model(tmp_path / "back")
    assert back.config.vocab_size == tokenizer.vocab_size
    assert (tmp_path / "back/tokenizer.json").read_bytes() == tokenizer_file.read_bytes()


def test_the_exported_folder_generates_no_id_without_a_token_and_the_eos_comes_back(tmp_path, tokenizer_file):
    config = ModelConfig(**(OLMO | {"vocab_size": 350, "padded_vocab_size": 384}))
    write_random_checkpoint(tmp_path / "ours", config)
    tokenizer = load_tokenizer(tokenizer_file, eos="<|padding|>")
    convert_hf.export_hf(tmp_path / "ours", tmp_path / "theirs", tokenizer=tokenizer)
    generation = json.loads((tmp_path / "theirs/generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(tokenizer.vocab_size, 384))
    assert load_tokenizer(tmp_path / "theirs").eos_text == "<|padding|>"
    convert_hf.import_hf(tmp_path / "theirs", tmp_path / "back")
    assert load_tokenizer(tmp_path / "back").eos_text == "<|padding|>"


def test_a_tokenizer_that_is_too_large_is_refused(tmp_path, tokenizer_file):
    write_random_checkpoint(tmp_path / "ours", ModelConfig(**(OLMO | {"vocab_size": 256})))
    with pytest.raises(ConfigError, match="the model only 256"):
        convert_hf.export_hf(tmp_path / "ours", tmp_path / "theirs", tokenizer=load_tokenizer(tokenizer_file))


# ---- an imported folder is a checkpoint


def test_training_starts_and_resumes_from_an_imported_folder(tmp_path, tiny_words, run_main, read_metrics):
    write_random_checkpoint(tmp_path / "ours", ModelConfig(**(OLMO | {"mlp_hidden": 176, "seq_len": 64})))
    assert run_main("convert", "export-hf", tmp_path / "ours", tmp_path / "theirs").returncode == 0
    out = run_main("convert", "import-hf", tmp_path / "theirs", tmp_path / "back")
    assert out.returncode == 0 and "logits differ by at most" in out.stdout, out.stderr
    losses = {}
    for key in ("init_from", "resume_from"):
        words = tiny_words(key, total_steps=3, **{key: tmp_path / "back"})
        out = run_main("train", tmp_path / "back/config.yaml", *words)
        assert out.returncode == 0, out.stderr
        losses[key] = [line["train/CrossEntropyLoss"] for line in read_metrics(tmp_path / key)]
    assert losses["init_from"] == losses["resume_from"] and len(losses["init_from"]) == 3


def test_what_two_processes_saved_is_exported_whole(tmp_path, tiny_args, run_main):
    trained_on(2, tiny_args("run", total_steps=1, micro_batch_size=2))
    out = run_main("convert", "export-hf", tmp_path / "run", tmp_path / "theirs", "--dtype", "fp32")
    assert out.returncode == 0, out.stderr
    with torch.no_grad():
        ours, theirs = load.load_model(tmp_path / "run"), load_theirs(tmp_path / "theirs")
        assert differences(ours(TOKENS), theirs(TOKENS).logits)[0] <= 2e-5
