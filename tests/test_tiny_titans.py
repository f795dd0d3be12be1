"""make tiny-titans: pairs are gathered whole and split by source package, finished runs are skipped, and finetuning teaches, also
a base that is pretrained here."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from data_sources import library_pairs, texts
from runs import lines_of, load_script
from safetensors.torch import load_file

from olmo_train import config
from olmo_train.data.tokenizer import save_tokenizer, train_tokenizer
from olmo_train.train_config import TrainConfig

ROOT = Path(__file__).parent.parent
METHODS = ("full", "lora", "dora", "lora-plus")
LONG = "It has twenty words or more because a description with fewer of them is hardly longer than its synopsis is {}."
PACKAGES = """Package: libcat2
Source: cat (2.1)
Version: 2.1

Package: libcat-dev
Source: cat
Version: 2.1

Package: dog
Version: 1
"""
DESCRIPTIONS = f"""Package: libcat2
Description-md5: 1
Description-en: purring (shared library)
 Cats purr.
 {LONG.format("two")}
 .
 It has:
  * paws
  * whiskers
 .
 The end.

Package: libcat-dev
Description-md5: 2
Description-en: purring (headers)
 {LONG.format("dev")}

Package: short
Description-md5: 3
Description-en: too short
 A dog.

Package: dog-copy
Description-md5: 4
Description-en: the same text again
 {LONG.format("dev")}

Package: dog
Description-md5: 5
Description-en: barking
 {LONG.format("dog")}
 {LONG.format("dog")}
"""


def test_descriptions_lose_their_markup_and_keep_their_lines():
    script = load_script(ROOT / "launch/gather_pairs.py")
    assert script.sources_of(PACKAGES) == {"libcat2": "cat", "libcat-dev": "cat", "dog": "dog"}
    found = list(script.pairs_of(DESCRIPTIONS, 1000))
    assert [(name, short) for name, _, short in found] == [
        ("libcat2", "purring (shared library)"), ("libcat-dev", "purring (headers)"), ("dog", "barking"),
    ]  # fmt: skip
    assert found[0][1] == f"Cats purr. {LONG.format('two')}\nIt has:\n* paws\n* whiskers\nThe end."
    assert [name for name, *_ in script.pairs_of(DESCRIPTIONS, 25)] == ["libcat-dev"]


def test_packages_of_one_source_are_in_the_same_part(tmp_path, monkeypatch, capsys):
    script = load_script(ROOT / "launch/gather_pairs.py")
    shares = [script.share_of(f"package-{i}") for i in range(2000)]
    assert all(0 <= share < 1 for share in shares) and 0.03 < sum(share < 0.05 for share in shares) / 2000 < 0.07
    monkeypatch.setattr(script, "fetch", lambda folder: (PACKAGES, DESCRIPTIONS + "\n" + DESCRIPTIONS.replace("dog", "owl")))
    monkeypatch.setattr(script, "share_of", lambda name: {"cat": 0.01, "dog": 0.5, "owl": 0.07}.get(name, 0.3))
    monkeypatch.setattr(script.shutil, "which", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["gather_pairs.py", str(tmp_path)])
    script.main()
    parts = {part: [(row["id"], row["source"]) for row in lines_of(tmp_path, f"{part}.jsonl")] for part in script.PARTS}
    assert parts == {
        "test": [("libcat2", "cat"), ("libcat-dev", "cat")], "train": [("dog", "dog")], "validation": [("owl", "owl")],
    }  # fmt: skip
    (first, _) = lines_of(tmp_path, "test.jsonl")
    assert first["response"] == "purring (shared library)" and first["prompt"].startswith("Cats purr.")
    assert "test.jsonl: 2 pairs of 1 source package" in capsys.readouterr().out


def test_a_system_without_apt_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    script = load_script(ROOT / "launch/gather_pairs.py")
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["gather_pairs.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: apt-get: not found; .* Debian"):
        script.main()


def write_gguf(file: Path, model, tokenizer) -> dict[str, torch.Tensor]:
    """A Llama as llama.cpp writes it, its matrices in 4 bits (Q4_1). Returns the weights that those bits stand for."""
    gguf, size = pytest.importorskip("gguf"), model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(size.num_hidden_layers)
    writer.add_context_length(size.max_position_embeddings)
    writer.add_embedding_length(size.hidden_size)
    writer.add_feed_forward_length(size.intermediate_size)
    writer.add_head_count(size.num_attention_heads)
    writer.add_head_count_kv(size.num_key_value_heads)
    writer.add_layer_norm_rms_eps(size.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(size.vocab_size)
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([3] + [1] * (len(vocabulary) - 1))  # the EOS is a control token, the others are normal ones
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, size.num_hidden_layers)
    meant = {}
    for name, value in model.state_dict().items():
        heads = {"q_proj": size.num_attention_heads, "k_proj": size.num_key_value_heads}.get(name.split(".")[-2])
        if value.dim() == 1:
            writer.add_tensor(names.get_name(name, (".weight",)), value.numpy())
            meant[name] = value
            continue
        rows = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape) if heads else value  # as llama.cpp
        kind = gguf.GGMLQuantizationType.Q4_1
        bits = gguf.quants.quantize(rows.contiguous().numpy(), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), bits, raw_dtype=kind)
        rows = torch.from_numpy(gguf.quants.dequantize(bits, kind))
        meant[name] = rows.view(heads, -1, 2, value.shape[1]).transpose(1, 2).reshape(value.shape) if heads else rows
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def test_a_model_of_4_bits_is_written_in_fp32_and_imported(tmp_path, monkeypatch, run_main):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(train_tokenizer(texts(50), 288), tmp_path / "tokenizer.json")
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    settings = transformers.LlamaConfig(**shape, vocab_size=len(tokenizer["model"]["vocab"]), max_position_embeddings=64)
    torch.manual_seed(0)
    meant = write_gguf(tmp_path / "tiny.gguf", transformers.LlamaForCausalLM(settings), tokenizer)
    monkeypatch.setattr(sys, "argv", ["dequantize.py", str(tmp_path / "tiny.gguf"), str(tmp_path / "out")])
    load_script(ROOT / "launch/dequantize.py").main()
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == meant.keys()
    assert all(torch.equal(written[name], meant[name]) for name in meant)
    done = run_main("convert", "import-hf", tmp_path / "out", tmp_path / "base")
    assert done.returncode == 0 and "logits differ by at most" in done.stdout, done.stderr


def test_each_method_trains_what_its_name_says(tmp_path):
    words = ["run_dir=any", "init_from=any", "data.sources.pairs.path=any"]
    for method in METHODS:
        files = [ROOT / "configs/finetune/tiny-titans.yaml", ROOT / f"configs/finetune/{method}.yaml"]
        run = config.load(TrainConfig, files, words)
        kind = {"full": "none", "dora": "dora"}.get(method, "lora")
        assert (run.adapter.kind, run.adapter.lr_ratio != 1) == (kind, method == "lora-plus")
        assert run.data.document_mask and run.total_epochs == 1
    assert {file.stem for file in (ROOT / "configs/finetune").glob("*.yaml")} == {"tiny-titans", *METHODS}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """launch/tiny_titans.py, whose commands are recorded instead of run. The ROUGE-L of DoRA is the highest."""
    script = load_script(ROOT / "launch/tiny_titans.py")
    script.commands = []

    def olmo_train(*words):
        words = [str(word) for word in words]
        script.commands.append(words)
        if words[0] == "prepare-data":
            folder = Path(words[words.index("--output") + 1])
            folder.mkdir(parents=True)
            (folder / "meta.json").touch()
        elif words[0] == "evaluate":
            file = Path(words[words.index("--output") + 1])
            write_results(file, 0.3 + 0.1 * ("dora" in file.parent.name))
        elif words[0] == "train":
            folder = Path(next(word for word in words if word.startswith("run_dir=")).removeprefix("run_dir="))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").touch()

    monkeypatch.setattr(script, "olmo_train", olmo_train)
    data, base = tmp_path / "data", tmp_path / "base"
    data.mkdir()
    base.mkdir()
    (base / "config.yaml").write_text("model: {d_model: 8}\ntotal_steps: 7\n")
    for part in ("train", "validation", "test"):
        (data / f"{part}.jsonl").write_text("".join(json.dumps({"id": f"{part}-{i}"}) + "\n" for i in range(900)))
    words = ["tiny_titans.py", "--base", str(base), "--data", str(data), "--runs", str(tmp_path / "runs"), "total_epochs=2"]
    monkeypatch.setattr(sys, "argv", words)
    return script


def write_results(file: Path, f1: float) -> None:
    scores = {name: {"f1": f1, "low": f1 - 0.02, "high": f1 + 0.02} for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")}
    rouge = {"examples": 4, "scores": scores, "lead_1": scores, "words": {"prediction": 6.25, "lead_1": 15}, "ended": 0.995}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"rouge": rouge}))
    rows = [{"prompt": f"document {i}", "reference": f"title {i}", "prediction": f"{f1:.1f}\n{i}"} for i in range(4)]
    (file.parent / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_best_method_is_trained_on_more_pairs_and_all_are_reported(script, tmp_path):
    script.main()
    runs = tmp_path / "runs"
    trained = [Path(word).name for words in script.commands for word in words if word.startswith("run_dir=")]
    assert trained == ["lora-320", "full-320", "dora-320", "lora-plus-320", "dora-800"]
    assert [len((tmp_path / f"data/prepared/train-{n}.jsonl").read_text().splitlines()) for n in (320, 800)] == [320, 800]
    first = next(words for words in script.commands if words[0] == "train")
    assert yaml.safe_load(Path(first[1]).read_text()) == {"model": {"d_model": 8}} and first[-1] == "total_epochs=2"
    evaluations = [words for words in script.commands if words[0] == "evaluate"]
    assert ["--template" in words for words in evaluations] == [True] + [False] * 5  # the runs record theirs
    assert all(words[words.index("--limit") + 1] == "500" for words in evaluations)
    report = (runs / "report.md").read_text()
    assert (
        "| DoRA, 800 pairs | 40.00 (38.00 to 42.00) | 40.00 (38.00 to 42.00) | 40.00 (38.00 to 42.00) | 6.2 | 99.5% |" in report
    )
    assert report.count("\n| ") == 7 and "- reference: title 3" in report and "- DoRA, 320 pairs: 0.4 3" in report
    assert [Path(words[-1]).name for words in script.commands if words[0] == "curves"] == ["curves.html", "curves.png"]


def test_what_is_finished_is_not_done_again(script, tmp_path):
    script.main()
    (tmp_path / "runs/dora-320/evaluation.json").unlink()
    script.commands.clear()
    script.main()
    done = [(words[0], Path(words[-1]).parent.name) for words in script.commands if words[0] != "curves"]
    assert [verb for verb, _ in done] == ["train", "evaluate"] and done[1][1] == "dora-320"  # a finished run is a no-op of train


def test_a_command_that_fails_ends_the_script_with_its_exit_code():
    script = load_script(ROOT / "launch/tiny_titans.py")
    with pytest.raises(SystemExit) as failed:
        script.olmo_train("evaluate", "nowhere")
    assert failed.value.code == 4


# ---- from random weights to answers


def write_pairs(folder: Path) -> int:
    """train.jsonl, validation.jsonl, test.jsonl, and text.jsonl to pretrain on: what a module is for, and the prompts of four of
    its training pairs. Returns the number of training pairs."""
    rows = [{"prompt": text, "response": summary} for text, summary in library_pairs()]
    parts = {"test": rows[:200], "validation": rows[200:232], "train": rows[232:]}
    documents = []
    for summary in {row["response"] for row in rows}:
        prompts = [row["prompt"] for row in parts["train"] if row["response"] == summary]
        documents += [{"text": "\n\n".join([summary, *prompts[i : i + 4]])} for i in range(0, len(prompts), 4)]
    documents.sort(key=lambda document: document["text"][::-1])  # an order that has nothing to do with the modules
    for name, records in (parts | {"text": documents}).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return len(parts["train"])


@pytest.mark.slow
def test_a_base_that_is_pretrained_here_learns_to_answer_and_to_stop(tmp_path, run_main, monkeypatch):
    """Asked for the module that a piece of documentation is from, the base writes on; finetuned, with all weights or with
    adapters, it answers with what the module is for, for pieces that it has not read. Two minutes."""

    def olmo_train(*words):
        done = run_main(*words)
        assert done.returncode == 0, done.stderr

    n = write_pairs(tmp_path)
    shape = ["model.d_model=128", "model.mlp_hidden=352", "model.vocab_size=2048", "model.padded_vocab_size=2048"]
    olmo_train("train-tokenizer", "text.jsonl", "--output", "tokenizer.json", "--vocab-size", 2048)
    olmo_train("prepare-data", "text.jsonl", "--output", "text", "--tokenizer", "tokenizer.json")
    same = ["log.wandb.mode=disabled", "parallel.precision=fp32", "parallel.compile=false"]
    words = ["run_dir=base", "data.sources.text.path=text", "total_steps=120", "global_batch_size=16", *same]
    olmo_train("train", ROOT / "configs/models/tiny.yaml", *shape, *words)
    script = load_script(ROOT / "launch/tiny_titans.py")
    monkeypatch.setattr(script, "olmo_train", olmo_train)
    base = "--base base/checkpoints/step-0000120 --data . --runs runs --more 0 --template olmo --instruction= --pack 128"
    options = [*base.split(), "--examples", str(n), "--limit", "200", "--max-new-tokens", "20"]
    for method, own in {"full": ["optim.peak_lr=4e-3"], "lora": ["optim.peak_lr=1e-2", "total_epochs=2"]}.items():
        monkeypatch.setattr(
            sys,
            "argv",
            ["tiny_titans.py", "--methods", method, *options, *own, "global_batch_size=8", "micro_batch_size=8", *same],
        )
        script.main()
    names = {"base": "base", "full": f"full-{n}", "lora": f"lora-{n}"}
    found = {name: json.loads((Path("runs") / folder / "evaluation.json").read_text())["rouge"] for name, folder in names.items()}
    scores = {name: rouge["scores"]["rougeL"]["f1"] for name, rouge in found.items()}
    assert scores["base"] > 0.03, scores  # three times nothing would prove nothing
    assert all(scores[name] >= 3 * scores["base"] and found[name]["ended"] >= 0.95 for name in ("full", "lora")), scores
