"""Adapters to PEFT's folders and back, and merged: real peft reads and writes the folders, and every model is the one trained.

The oracle is peft on transformers' models in fp32.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import conftest
import peft
import pytest
import torch
import transformers
from data_sources import texts
from references.random_models import FALCON, GEMMA, LLAMA, OLMO, OLMO2, write_random_checkpoint
from runs import trained
from safetensors.torch import load_file, save_file
from test_convert_hf import load_theirs
from test_templates import chat_tokenizer  # noqa: F401
from torch import Tensor

from olmo_train import config as configuration
from olmo_train.checkpoint import folders, load
from olmo_train.convert import families
from olmo_train.convert import hf as convert_hf
from olmo_train.convert import peft as convert_peft
from olmo_train.convert.folders import on_meta, write_checkpoint
from olmo_train.data.prepare.prepare import PrepareOptions, prepare
from olmo_train.data.templates import open_format, recorded_template
from olmo_train.data.tokenizer import CONFIG_FILE, config_file, load_tokenizer
from olmo_train.errors import CheckpointError, ConfigError
from olmo_train.model import adapter as adapters
from olmo_train.model.adapter import adapt, own_parameters
from olmo_train.model.config import AdapterConfig, ModelConfig
from olmo_train.model.generate import generate
from olmo_train.storage import commit_folder, hash_file
from olmo_train.train_config import TrainConfig

SHAPES = {"llama": LLAMA | {"n_kv_heads": 2}, "olmo": OLMO, "olmo2": OLMO2, "gemma": GEMMA, "falcon": FALCON}
CONFIGS = {family: ModelConfig(**shape) for family, shape in SHAPES.items()}
KINDS = {
    "lora": AdapterConfig("lora", rank=4, alpha=16),
    "dora": AdapterConfig("dora", rank=4, alpha=12.5, targets=("wq", "wv", "wo", "w_gate", "w_down")),
    "rslora": AdapterConfig("lora", rank=4, alpha=16, rank_stabilized=True, targets=("wq", "wk", "w_up")),
}
IDS = torch.randint(450, (2, 24), generator=torch.Generator().manual_seed(2))


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def write_adapted(folder: Path, base: Path, config: ModelConfig, adapter: AdapterConfig, dtype: str = "fp32") -> dict:
    """A checkpoint of random adapters beside a base; returns them. Magnitudes are near the norms of the rows, as in training."""
    weights, generator = load.WeightReader(base), torch.Generator().manual_seed(7)
    values = {}
    for name, parameter in own_parameters(on_meta(config, adapter)).items():
        noise = torch.randn(parameter.shape, generator=generator)
        values[name] = 0.1 * noise
        if name.endswith("magnitude"):
            values[name] = (1 + 0.03 * noise) * weights(name.replace("adapter.magnitude", "weight")).norm(dim=1)
    temporary = folder.with_name(f".{folder.name}")
    temporary.mkdir()
    saved = {"model": configuration.to_dict(config), "adapter": configuration.to_dict(adapter)}
    record = folders.base_record(folders.resolve(base), dtype)
    read = values.__getitem__
    commit_folder(temporary, folder, write_checkpoint(temporary, config, saved, read, {}, adapter=adapter, base=record))
    return values


@torch.no_grad()
def adapted_logits(base: Path, values: dict, adapter: AdapterConfig) -> Tensor:
    """Of our model with adapters, in one piece, without any reader of adapters."""
    model = adapt(load.load_model(base), adapter)
    for name, parameter in own_parameters(model).items():
        parameter.copy_(values[name])
    return model(IDS)


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """base_of(family): (our checkpoint, transformers' folder) of a random model."""
    made = {}

    def base(family: str) -> tuple[Path, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            write_random_checkpoint(folder / "ours", CONFIGS[family])
            convert_hf.export_hf(folder / "ours", folder / "theirs")
            made[family] = folder / "ours", folder / "theirs"
        return made[family]

    return base


@pytest.fixture
def adapted(tmp_path, base_of):
    """adapted(family, adapter): (checkpoint of random adapters, the base's transformers folder, logits of both together)."""

    def make(family: str, adapter: AdapterConfig = KINDS["lora"]):
        ours, theirs = base_of(family)
        values = write_adapted(tmp_path / "run", ours, CONFIGS[family], adapter)
        return tmp_path / "run", theirs, adapted_logits(ours, values, adapter)

    return make


@torch.no_grad()
def logits_of(checkpoint: Path) -> Tensor:
    return load.load_model(checkpoint)(IDS)


@torch.no_grad()
def peft_logits(base: Path, folder: Path) -> tuple[Tensor, Tensor, dict]:
    """(logits, merged logits, what save_pretrained writes) of real peft's model of a folder."""
    model = peft.PeftModel.from_pretrained(load_theirs(base), folder).eval()
    model.save_pretrained(folder.parent / "saved")
    saved = load_file(folder.parent / "saved" / "adapter_model.safetensors")
    return model(IDS).logits, model.merge_and_unload()(IDS).logits, saved


# ---- the same model everywhere


CASES = [(family, kind) for family in ("llama", "olmo", "olmo2", "gemma") for kind in ("lora", "dora")] + [("llama", "rslora")]


@torch.no_grad()
@pytest.mark.parametrize("family, kind", CASES)
def test_peft_and_the_merged_checkpoint_are_the_adapted_model(tmp_path, adapted, family, kind):
    run, base, logits = adapted(family, KINDS[kind])
    proof = convert_peft.export_peft(run, tmp_path / "peft")
    found, unloaded, saved = peft_logits(base, tmp_path / "peft")
    assert proof.relative <= 1e-5 and relative(found, logits) <= 1e-5 and relative(unloaded, logits) <= 1e-5
    ours = load_file(tmp_path / "peft/adapter_model.safetensors")
    assert ours.keys() == saved.keys() and all(torch.equal(ours[name], saved[name]) for name in saved)

    proof = convert_peft.merge(run, tmp_path / "merged")
    merged = load.load_model(tmp_path / "merged")
    assert proof.relative <= 1e-5 and relative(merged(IDS), logits) <= 1e-5
    assert relative(load.load_model(run)(IDS), logits) <= 1e-5 < 1e-2 < relative(load_theirs(base)(IDS).logits, logits)
    assert "base" not in folders.read_state(tmp_path / "merged")
    assert "adapter" not in configuration.read([tmp_path / "merged/config.yaml"])


@torch.no_grad()
@pytest.mark.parametrize("family, kind", [("llama", "dora"), ("olmo", "lora"), ("olmo2", "rslora"), ("gemma", "dora")])
def test_what_peft_saved_is_imported_and_exported_again(tmp_path, base_of, family, kind):
    ours, theirs = base_of(family)
    config, adapter = CONFIGS[family], KINDS[kind]
    names = {mapping.ours[0]: mapping.theirs for mapping in families.mappings(family, config)}
    modules = {names[f"blocks.0.{part}.{target}.weight"].split(".")[-2] for target in adapter.targets
               for part in ("attn", "mlp") if f"blocks.0.{part}.{target}.weight" in names}  # fmt: skip
    model = peft.get_peft_model(load_theirs(theirs), peft.LoraConfig(
        r=4, lora_alpha=adapter.alpha, target_modules=sorted(modules), use_dora=kind == "dora", use_rslora=kind == "rslora",
        task_type="CAUSAL_LM", lora_dropout=0.05,
    ))  # fmt: skip
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by = 0.1 * torch.randn_like(parameter)
            parameter.copy_(parameter * (1 + 0.3 * by) if "magnitude" in name else by)
    model.eval().save_pretrained(tmp_path / "peft")
    logits = model(IDS).logits
    proof = convert_peft.import_peft(tmp_path / "peft", tmp_path / "run", ours)
    assert proof.relative <= 1e-5 and relative(load.load_model(tmp_path / "run")(IDS), logits) <= 1e-5
    stored = configuration.build(AdapterConfig, configuration.read([tmp_path / "run/config.yaml"])["adapter"], "adapter")
    assert stored == adapter
    convert_peft.export_peft(tmp_path / "run", tmp_path / "again")
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("peft", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# ---- the proof sees what it has to see


def in_bf16(weight, values, scale):
    return adapters.merged(weight.bfloat16(), {key: value.bfloat16() for key, value in values.items()}, scale).float()


def without_magnitude(weight, values, scale):
    return adapters.merged(weight, {key: value for key, value in values.items() if key != "magnitude"}, scale)


@pytest.mark.parametrize("fault", [in_bf16, without_magnitude])
@pytest.mark.parametrize("convert", [convert_peft.merge, convert_hf.export_hf])
def test_a_wrong_merge_is_not_written(tmp_path, adapted, monkeypatch, fault, convert):
    run, _, _ = adapted("llama", KINDS["dora"])
    monkeypatch.setattr(load, "merged", fault)
    with pytest.raises(CheckpointError, match="was not converted: logits differ"):
        convert(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def exchanged(names: dict[str, str]) -> dict[str, str]:
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    swap = lambda name: ".".join(other.get(part, part) for part in name.split("."))  # noqa: E731
    return {swap(theirs): ours for theirs, ours in names.items()}


def shared(names: dict[str, str]) -> dict[str, str]:
    of_q = lambda ours: ours.replace("attn.wk", "attn.wq").replace("attn.wv", "attn.wq")  # noqa: E731
    return {theirs: of_q(ours) if ours.endswith("lora_a") else ours for theirs, ours in names.items()}


@pytest.mark.parametrize("fault", [exchanged, shared])
def test_a_wrong_name_is_not_exported(tmp_path, adapted, monkeypatch, fault):
    run, _, _ = adapted("olmo", KINDS["lora"])
    right = convert_peft.peft_names
    monkeypatch.setattr(convert_peft, "peft_names", lambda *args: fault(right(*args)))
    with pytest.raises(CheckpointError, match="was not converted: logits differ"):
        convert_peft.export_peft(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_wrong_scale_is_not_exported(tmp_path, adapted, monkeypatch):
    run, _, _ = adapted("llama", KINDS["lora"])
    right = json.dumps
    wrong = lambda values, **rest: right(values | {"use_rslora": True} if "use_rslora" in values else values, **rest)  # noqa: E731
    monkeypatch.setattr(convert_peft.json, "dumps", wrong)
    with pytest.raises(CheckpointError, match="was not converted: logits differ"):
        convert_peft.export_peft(run, tmp_path / "out")


def test_an_export_in_bf16_says_what_rounding_costs(tmp_path, adapted):
    run, _, logits = adapted("llama", KINDS["dora"])
    proof = convert_hf.export_hf(run, tmp_path / "bf16", dtype="bf16")
    assert proof.relative <= 5e-6 and 1e-4 < proof.lost < 1e-1 and "rounding moved them" in str(proof)
    with torch.no_grad():
        theirs = load_theirs(tmp_path / "bf16").float()(IDS).logits
        assert relative(theirs, logits) == pytest.approx(proof.lost, rel=0.3)
        convert_hf.export_hf(run, tmp_path / "fp32")
        assert relative(load_theirs(tmp_path / "fp32")(IDS).logits, logits) <= 1e-5


def test_adapters_of_a_bf16_run_are_exported_beside_the_rounded_base(tmp_path, base_of):
    ours, _ = base_of("llama")
    adapter = KINDS["dora"]
    values = write_adapted(tmp_path / "run", ours, CONFIGS["llama"], adapter, "bf16")
    convert_peft.export_peft(tmp_path / "run", tmp_path / "peft")
    convert_hf.export_hf(ours, tmp_path / "rounded", dtype="bf16")
    with torch.no_grad():
        base = load_theirs(tmp_path / "rounded").float()
        found = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()(IDS).logits
        model = adapt(load.load_model(ours).bfloat16().float(), adapter)
        for name, parameter in own_parameters(model).items():
            parameter.copy_(values[name])
        assert relative(found, model(IDS)) <= 1e-5
        convert_peft.import_peft(tmp_path / "peft", tmp_path / "back", ours, "bf16")
        assert relative(load.load_model(tmp_path / "back")(IDS), model(IDS)) <= 1e-5
    assert "--dtype bf16" in convert_peft.how_to_load(tmp_path / "run")


# ---- what cannot be expressed


def test_falcons_fused_matrix_is_refused_and_its_other_ones_are_exported(tmp_path, adapted):
    run, base, logits = adapted("falcon", AdapterConfig("lora", rank=4, targets=("wo", "w_up", "w_down")))
    convert_peft.export_peft(run, tmp_path / "peft")
    assert relative(peft_logits(base, tmp_path / "peft")[0], logits) <= 1e-5
    shutil.rmtree(run)
    run, _, _ = adapted("falcon", AdapterConfig("lora", rank=4, targets=("wq", "wo")))
    with pytest.raises(ConfigError, match="wq, wk, wv as one matrix, query_key_value, which has one A in PEFT") as problem:
        convert_peft.export_peft(run, tmp_path / "fused")
    assert problem.value.where == "adapter.targets" and not (tmp_path / "fused").exists()
    convert_peft.merge(run, tmp_path / "merged")


def test_a_model_with_multipliers_is_refused():
    config = dataclasses.replace(CONFIGS["llama"], parametrization="mup", base_width=32)
    with pytest.raises(ConfigError, match="mup has multipliers") as problem:
        convert_peft.peft_names("llama", config, KINDS["lora"])
    assert problem.value.where == "model.parametrization"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, base_of):
    """A PEFT folder of a DoRA adapter of the llama base."""
    folder, (ours, _) = tmp_path_factory.mktemp("exported"), base_of("llama")
    write_adapted(folder / "run", ours, CONFIGS["llama"], KINDS["dora"])
    convert_peft.export_peft(folder / "run", folder / "peft", "their/base")
    return folder / "peft"


@pytest.fixture
def importing(tmp_path, exported, base_of):
    """importing(settings, tensors): import a copy of the PEFT folder with changes; a None removes the tensor."""

    def convert(settings: dict | None = None, tensors: dict | None = None):
        shutil.copytree(exported, tmp_path / "peft", dirs_exist_ok=True)
        about = json.loads((tmp_path / "peft/adapter_config.json").read_text()) | (settings or {})
        (tmp_path / "peft/adapter_config.json").write_text(json.dumps(about))
        changed = load_file(tmp_path / "peft/adapter_model.safetensors") | (tensors or {})
        save_file({k: v for k, v in changed.items() if v is not None}, tmp_path / "peft/adapter_model.safetensors")
        return convert_peft.import_peft(tmp_path / "peft", tmp_path / "back", base_of("llama")[0])

    return convert


def test_the_settings_are_those_of_peft(exported):
    theirs = peft.PeftConfig.from_pretrained(exported)
    assert (theirs.base_model_name_or_path, theirs.r, theirs.lora_alpha, theirs.use_dora) == ("their/base", 4, 12.5, True)
    assert theirs.target_modules == {"q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}
    assert theirs.inference_mode and theirs.bias == "none" and theirs.task_type == "CAUSAL_LM" and not theirs.use_rslora
    assert json.loads((exported / "adapter_config.json").read_text()).keys() <= theirs.to_dict().keys()


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"a_key_of_tomorrow": {"x": 1}}, "a_key_of_tomorrow"),
        ({"r": 0}, "adapter.rank"),
        ({"lora_alpha": -1}, "adapter.alpha"),
    ],
)
def test_a_setting_that_we_cannot_express_is_refused_by_key(importing, tmp_path, settings, key):
    with pytest.raises(ConfigError) as problem:
        importing(settings)
    assert problem.value.where == key
    assert key.startswith("adapter.") or "merge it with PEFT (merge_and_unload" in str(problem.value)
    assert not (tmp_path / "back").exists()


Q = "base_model.model.model.layers.1.self_attn.q_proj."


@pytest.mark.parametrize(
    "settings, tensors, what",
    [
        ({}, {Q + "lora_A.weight": None}, r"layers.1.self_attn.q_proj.lora_A.weight is absent, expected \(4, 64\)"),
        ({}, {Q + "lora_A.weight": torch.zeros(5, 64)}, r"q_proj.lora_A.weight is \(5, 64\), expected \(4, 64\)"),
        ({}, {Q + "lora_B.bias": torch.zeros(64)}, r"q_proj.lora_B.bias is \(64,\), expected absent"),
        ({}, {"base_model.model.lm_head.weight": torch.zeros(512, 64)}, r"lm_head.weight is .*, expected absent"),
        ({}, {Q + "lora_magnitude_vector": None}, r"q_proj.lora_magnitude_vector is absent, expected \(64,\)"),
        ({"use_dora": False}, {}, r"lora_magnitude_vector is \(\d+,\), expected absent"),
        ({"r": 8}, {}, r"lora_A.weight is \(4, 64\), expected \(8, 64\)"),
        (
            {},
            {Q + "lora_magnitude_vector": torch.full((64,), torch.nan)},
            "q_proj.lora_magnitude_vector and 0 other",
        ),
    ],
)
def test_missing_extra_and_non_finite_tensors_are_named(importing, tmp_path, settings, tensors, what):
    with pytest.raises(CheckpointError, match=what):
        importing(settings, tensors)
    assert not (tmp_path / "back").exists()


def test_folders_that_are_none_are_refused(tmp_path, exported, base_of, adapted, importing, caplog):
    ours, theirs = base_of("llama")
    with pytest.raises(CheckpointError, match="holds no adapter_config.json"):
        convert_peft.import_peft(theirs, tmp_path / "back", ours)
    with pytest.raises(CheckpointError, match="adapts no matrix of a falcon model; its first tensor is base_model"):
        convert_peft.import_peft(exported, tmp_path / "back", base_of("falcon")[0])
    run, _, _ = adapted("llama")
    with pytest.raises(ConfigError, match="holds adapters alone; merge them into their base first: olmo-train convert merge"):
        convert_peft.import_peft(exported, tmp_path / "back", run)
    for convert in (convert_peft.merge, convert_peft.export_peft):
        with pytest.raises(ConfigError, match="has no adapters: its checkpoint holds all weights already"):
            convert(ours, tmp_path / "back")
        with pytest.raises(ConfigError, match="exists already"):
            convert(run, theirs)
    with pytest.raises(ConfigError, match="exists already"):
        convert_peft.import_peft(exported, theirs, ours)
    (tmp_path / "pickled").mkdir()
    shutil.copy(exported / "adapter_config.json", tmp_path / "pickled")
    (tmp_path / "pickled/adapter_model.bin").touch()
    with pytest.raises(CheckpointError, match="holds no adapter_model.safetensors; save it again"):
        convert_peft.import_peft(tmp_path / "pickled", tmp_path / "back", ours)
    (tmp_path / "pickled/adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no settings of PEFT"):
        convert_peft.import_peft(tmp_path / "pickled", tmp_path / "back", ours)
    shutil.copy(exported / "adapter_config.json", tmp_path / "pickled")
    (tmp_path / "pickled/adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: cannot be read"):
        convert_peft.import_peft(tmp_path / "pickled", tmp_path / "back", ours)
    importing({"lora_dropout": 0.05})
    assert "lora_dropout 0.05 is left out" in caplog.text


def test_an_imported_model_ends_its_turns_as_the_adapters_were_trained_to(tmp_path, chat_tokenizer):  # noqa: F811
    for name, eos in {"base": "<|endoftext|>", "peft": "<|im_end|>"}.items():
        (tmp_path / name).mkdir()
        shutil.copy(chat_tokenizer, tmp_path / name / "tokenizer.json")
        (tmp_path / name / CONFIG_FILE).write_bytes(config_file(eos))
    own = convert_peft._tokenizer_of(tmp_path / "base")
    both = convert_peft._tokenizer_of(tmp_path / "base", tmp_path / "peft")
    assert [json.loads(files[CONFIG_FILE])["eos_token"] for files in (own, both)] == ["<|endoftext|>", "<|im_end|>"]
    assert both["tokenizer.json"] == own["tokenizer.json"] == chat_tokenizer.read_bytes()


# ---- a run with adapters, from the command line


@pytest.fixture(scope="module")
def runs(tmp_path_factory, chat_tokenizer):  # noqa: F811
    """A folder with data of the template chatml, the run `base`, and the run `adapted` of DoRA beside it."""
    folder = tmp_path_factory.mktemp("runs")
    records = [{"prompt": text[:40], "response": text[40:60] + "."} for text in texts(120)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = PrepareOptions((str(folder / "pairs.jsonl"),), folder / "data", str(chat_tokenizer), template="chatml",
                             instruction="Continue.")  # fmt: skip
    prepare(options)
    shape = {"model.norm": "rms_norm", "total_steps": 2, "optim.warmup_steps": 1}
    words = conftest.words_of(folder / "base", folder / "data", **shape)
    trained(configuration.load(TrainConfig, [], words))
    adapter = {"adapter.kind": "dora", "adapter.rank": 4, "init_from": folder / "base", "optim.peak_lr": 0.1}
    words = conftest.words_of(folder / "adapted", folder / "data", **shape, **adapter)
    trained(configuration.load(TrainConfig, [], words))
    return folder


def test_a_trained_run_goes_everywhere(runs, tmp_path, run_main):
    """Merged it is taken by evaluate, generate, export-hf and init_from; exported and imported its adapters train on."""
    expected = logits_of(runs / "adapted")
    for words in (["merge", runs / "adapted", "merged"], ["export-peft", runs / "adapted", "peft", "--base-name", "theirs"],
                  ["export-hf", runs / "base", "theirs"], ["export-hf", "merged", "theirs-merged"],
                  ["import-peft", "peft", "back", "--base", runs / "base"]):  # fmt: skip
        out = run_main("convert", *words)
        assert out.returncode == 0 and f"{words[2]}: logits differ by at most" in out.stdout, out.stderr
    for folder in ("merged", "back"):
        assert torch.equal(logits_of(tmp_path / folder), expected)
    assert relative(peft_logits(tmp_path / "theirs", tmp_path / "peft")[0], expected) <= 1e-5
    with torch.no_grad():
        assert relative(load_theirs(tmp_path / "theirs-merged")(IDS).logits, expected) <= 1e-5

    question = ["--prompt", "Once", "--template", "chatml", "--temperature", 0, "--max-new-tokens", 8]
    answers = [run_main("generate", folder, *question).stdout for folder in (runs / "adapted", "merged", "back")]
    assert len(set(answers)) == 1 and answers[0].strip()
    out = run_main("generate", "merged", *question[:2], "--max-new-tokens", 1)
    assert out.stderr.startswith("note: merged was trained on the template chatml; --template chatml writes a prompt as there")
    assert run_main("convert", "import-hf", "theirs-merged", "from-theirs").returncode == 0
    records = [
        recorded_template(folders.resolve(folder)) for folder in (runs / "adapted", tmp_path / "back", tmp_path / "from-theirs")
    ]
    assert records[0]["instruction"] == "Continue." and records == records[:1] * 3
    figures = [run_main("evaluate", folder, "--data", f"x={runs / 'data'}", "--no-unigram", "--json")
               for folder in (runs / "adapted", "merged")]  # fmt: skip
    losses = [json.loads(out.stdout)["sources"] for out in figures]
    assert losses[0] == losses[1] and json.loads(figures[1].stdout)["step"] == 2
    files = [sorted(path.name for path in (tmp_path / folder).iterdir() if "token" in path.name) for folder in ("merged", "peft")]
    assert files == [["tokenizer.json", "tokenizer_config.json"]] * 2

    changes = {"total_steps": 1, "optim.warmup_steps": 1, "model.norm": "rms_norm"}
    words = conftest.words_of(tmp_path / "full", runs / "data", **changes, init_from=tmp_path / "merged")
    out = run_main("train", *words)
    assert out.returncode == 0, out.stderr
    words = conftest.words_of(tmp_path / "on", runs / "data", total_steps=1, resume_from=tmp_path / "back",
                              **{"optim.warmup_steps": 1})  # fmt: skip
    out = run_main("train", tmp_path / "back/config.yaml", *words)
    assert out.returncode == 0, out.stderr
    record = folders.read_state(folders.newest_folder(tmp_path / "on"))["base"]
    assert record["path"] == str(folders.newest_folder(runs / "base"))


def test_a_moved_base_is_named_to_merge(runs, tmp_path, run_main):
    shutil.copytree(runs / "base", tmp_path / "base")
    shutil.copytree(runs / "adapted", tmp_path / "run")
    folder = folders.newest_folder(tmp_path / "run")
    state = folder / "state.json"
    text = state.read_text().replace(str(runs / "base"), str(tmp_path / "nowhere"))
    config = (folder / "config.yaml").read_text().replace(f"init_from: {runs / 'base'}", "init_from: nowhere")
    for file, content in ((state, text), (folder / "config.yaml", config)):
        file.write_text(content)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    for name in ("state.json", "config.yaml"):
        manifest["files"][name] = {"size": (folder / name).stat().st_size, "sha256": hash_file(folder / name)}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    out = run_main("generate", tmp_path / "run", "--max-new-tokens", 2)
    assert out.returncode == 2 and f"olmo-train convert merge {folder} DEST --base PLACE" in out.stderr
    out = run_main("convert", "merge", folder, "merged", "--base", runs)
    assert out.returncode == 2 and f"error: --base: the base of {folder} is neither at {runs} nor at " in out.stderr
    for words in (["merge", folder, "merged"], ["export-hf", folder, "hf"], ["export-peft", folder, "peft"]):
        out = run_main("convert", *words, "--base", tmp_path / "base")
        assert out.returncode == 0, out.stderr
    assert run_main("generate", "merged", "--max-new-tokens", 2).returncode == 0
    out = run_main("convert", "export-hf", "merged", "other", "--base", tmp_path / "base")
    assert out.returncode == 2 and "error: --base: goes with a run with adapters, and merged holds all weights" in out.stderr


def test_the_exported_model_answers_as_ours_in_its_template(runs, tmp_path):
    """transformers stops at the turn's end too."""
    convert_hf.export_hf(runs / "adapted", tmp_path / "theirs")
    convert_peft.export_peft(runs / "adapted", tmp_path / "peft")
    folder = folders.newest_folder(runs / "adapted")
    chat = open_format("chatml", folder, None, "Continue.")
    messages = [{"role": "user", "content": "Once"}]
    for made in ("theirs", "peft"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / made)
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        assert found[0].tolist() == chat.prompt_ids([("user", "Once")]) and tokenizer.eos_token == "<|im_end|>"
    theirs = load_theirs(tmp_path / "theirs")
    assert theirs.generation_config.eos_token_id == chat.tokenizer.eos_id
    ours = generate(load.load_model(folder), [found[0].tolist()], 12, eos_id=chat.tokenizer.eos_id)[0]
    assert theirs.generate(found, do_sample=False, max_new_tokens=12)[0, found.shape[1] :].tolist() == ours
    other = load_tokenizer(folder / "tokenizer.json", eos="<|endoftext|>")
    convert_hf.export_hf(runs / "adapted", tmp_path / "other", tokenizer=other)
    assert "chat_template" not in json.loads((tmp_path / "other/tokenizer_config.json").read_text())
