"""The shipped YAML files: they say what their sources say, fit the configuration strictly, and start."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from olmo_train import config
from olmo_train.model.cost import count_parameters
from olmo_train.optim.schedules import lr_at
from olmo_train.train_config import TrainConfig, keys

ROOT = Path(__file__).parent.parent
MODELS = sorted((ROOT / "configs/models").glob("*.yaml"))
RUNS = sorted((ROOT / "configs/runs").glob("*.yaml"))
NEEDED = ["run_dir=runs/any", "data.sources.a.path=any"]

# Parameters of the released weights or of the paper, all tensors counted once.
PUBLISHED = {
    "olmo-1b": 1_176_764_416,
    "olmo-7b": 6_888_095_744,
    "olmo-7b-0424": 6_888_095_744,
    "olmo2-7b": 7_298_617_344,
    "llama2-7b": 6_738_415_616,
    "falcon-7b": 6_921_720_704 + 65_024 * 4_544,  # the released weights share embedding and head, the table does not
    "gemma-2b": 524_550_144 + 1_981_884_416,  # embedding and the rest, table 2 of the report
    "gemma-7b": 786_825_216 + 7_751_248_896,
}


def load(file: Path) -> TrainConfig:
    return config.load(TrainConfig, [file], NEEDED)


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.stem)
def test_an_architecture_names_no_paths_and_fits_strictly(file):
    assert not {"run_dir", "data"} & config.read([file]).keys()
    load(file)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_number(name):
    shape = load(ROOT / f"configs/models/{name}.yaml").model
    assert count_parameters(shape).total == PUBLISHED[name]


@pytest.mark.parametrize(
    "name, step, lr",
    [
        ("olmo-7b", 100_000, 2.4563812155867053e-4),
        ("olmo-1b", 100_000, 3.845348655775134e-4),
        ("olmo2-7b", 1000, 1.5e-4),  # its warmup starts at zero
        ("falcon-7b", 317_892, 1.2e-5),
        ("palm-8b", 40_000, 1.5e-4),  # half of the peak at four times the warmup
    ],
)
def test_learning_rates_follow_the_recipe(name, step, lr):
    run = load(ROOT / f"configs/models/{name}.yaml")
    assert lr_at(step, run.optim, run.steps) == pytest.approx(lr, rel=1e-12)


def shrunk(file: Path) -> list[str]:
    """Words that make a configuration tiny and keep what makes it special."""
    shape = load(file).model
    values = {"d_model": 64, "n_layers": 1, "n_heads": 4, "mlp_hidden": 96, "vocab_size": 512, "padded_vocab_size": 512}
    values |= {"seq_len": 32, "n_kv_heads": 1 if shape.kv_heads == 1 else 4, "head_dim": 32 if shape.head_dim else "null"}
    return [
        *(f"model.{key}={value}" for key, value in values.items()),
        *("total_steps=2", "global_batch_size=4", "micro_batch_size=2", "log.wandb.mode=disabled"),
    ]


START = """
import json, sys
from olmo_train import config
from olmo_train.train_config import TrainConfig, keys
from olmo_train.train import train
for files, words in json.load(sys.stdin):
    losses = [float(stats.loss) for stats in train(config.load(TrainConfig, files, words))]
    print(json.dumps([files[0], losses]))
"""


def test_every_shipped_configuration_starts_for_two_shrunk_steps(tmp_path, tiny_tokens):
    jobs = []
    for file in [*MODELS, *RUNS]:
        words = [*shrunk(file), f"run_dir={tmp_path / file.stem}", f"data.sources.a.path={tiny_tokens}"]
        jobs.append(([str(file)], words))
    out = subprocess.run(
        [sys.executable, "-c", START], input=json.dumps(jobs), capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert out.returncode == 0, out.stderr
    started = dict(json.loads(line) for line in out.stdout.splitlines() if line.startswith("["))
    assert set(started) == {files[0] for files, _ in jobs}
    for losses in started.values():
        assert len(losses) == 2 and all(4 < loss < 10 for loss in losses), losses  # near ln 512 = 6.2


def test_data_files_name_sources_and_their_held_out_parts():
    for file in (ROOT / "configs/data").glob("*.yaml"):
        data = config.load(TrainConfig, [file], ["run_dir=runs/any"]).data
        assert data.sources.keys() == data.validation.keys()


def test_every_configuration_key_has_a_reader():
    read = set()
    for file in (ROOT / "olmo_train").rglob("*.py"):
        read |= {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
    assert [key.name for key in keys() if key.name.rpartition(".")[2] not in read] == []


TABLE = re.findall(r"^\| (\S+) \| (.+) \|$", (ROOT / "docs/architectures.md").read_text().split("## Parameters")[1], re.MULTILINE)


def test_the_table_of_architectures_says_what_the_configurations_are():
    rows = {name: cells.split(" | ") for name, cells in TABLE if (ROOT / f"configs/models/{name}.yaml").is_file()}
    assert rows.keys() == {file.stem for file in MODELS} - {"tiny"}
    for name, (shape, *numbers) in rows.items():
        model = load(ROOT / f"configs/models/{name}.yaml").model
        count = count_parameters(model)
        assert shape == f"{model.d_model} / {model.n_heads} / {model.kv_heads} / {model.n_layers}"
        parts = [count.embedding, count.attention, count.mlp, count.norms, count.head, count.total]
        assert [int(number.replace(",", "")) for number in numbers] == [model.mlp_hidden, model.vocab_rows, *parts]
