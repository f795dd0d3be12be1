"""lm-evaluation-harness loads an exported folder and scores it as our own model does.

`make test-tools` installs its command in a separate environment, .venv/lm-eval; LM_EVAL names another one.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from references.random_models import OLMO, write_random_checkpoint

from olmo_train.checkpoint import load
from olmo_train.convert import hf
from olmo_train.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from olmo_train.model.config import ModelConfig

COMMAND = os.environ.get("LM_EVAL") or shutil.which("lm_eval", path=f"{sys.prefix}/lm-eval/bin")
DOCUMENTS = [
    {"text": "the quick brown", "choices": [" fox", " dog"], "gold": 0},
    {"text": "jumps over the", "choices": [" lazy", " box"], "gold": 0},
    {"text": "pack my", "choices": [" fox", " box"], "gold": 1},
]
TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.skipif(COMMAND is None, reason="lm_eval is not installed; run make test-tools")
def test_lm_eval_scores_an_exported_folder_as_our_model_does(tmp_path):
    save_tokenizer(train_tokenizer(["the quick brown fox jumps over the lazy dog " * 20], 300), tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    shape = ModelConfig(**(OLMO | {"vocab_size": tokenizer.vocab_size, "padded_vocab_size": 384}))
    write_random_checkpoint(tmp_path / "ours", shape, {"tokenizer.json": tokenizer.json.encode()})
    hf.export_hf(tmp_path / "ours", tmp_path / "theirs")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    (tmp_path / "tasks/local.yaml").write_text(TASK.format(file=tmp_path / "documents.jsonl"))
    words = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'theirs'},dtype=float32", "--tasks", "local_choice"]
    words += ["--include_path", tmp_path / "tasks", "--device", "cpu", "--log_samples", "--output_path", tmp_path / "out"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    out = subprocess.run([COMMAND, *words], capture_output=True, text=True, env={**os.environ, **offline})
    assert out.returncode == 0, out.stderr
    samples = [json.loads(line) for file in tmp_path.glob("out/**/samples*") for line in file.read_text().splitlines()]
    assert len(samples) == len(DOCUMENTS)
    model = load.load_model(tmp_path / "ours")
    for sample, document in zip(sorted(samples, key=lambda sample: sample["doc_id"]), DOCUMENTS, strict=True):
        ours = [log_likelihood(model, tokenizer, document["text"], choice) for choice in document["choices"]]
        assert [float(score) for score, _ in sample["filtered_resps"]] == pytest.approx(ours, abs=1e-4)
        assert sample["acc"] == float(ours.index(max(ours)) == document["gold"])


@torch.no_grad()
def log_likelihood(model, tokenizer, text: str, continuation: str) -> float:
    context, whole = tokenizer.encode(text), tokenizer.encode(text + continuation)
    logits = model(torch.tensor([whole]))[0]
    return sum(logits[i - 1].log_softmax(-1)[whole[i]].item() for i in range(len(context), len(whole)))
