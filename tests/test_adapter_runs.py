"""Runs with adapters: nothing else is trained, saved and resumed, and the base is the checkpoint that it was.

test_adapter.py has the formulas.
"""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import words_of
from ranks import exit_code, fork, on_ranks
from runs import LOSS, cut, events_of, first_quick, history, lines_of, trained
from test_adapter import relative
from test_guards import states_of
from test_replicas import flip_after, in_replicas

from olmo_train import config as configuration
from olmo_train import train as training
from olmo_train.checkpoint import folders
from olmo_train.checkpoint.load import load_model
from olmo_train.errors import ConfigError, ReplicaError
from olmo_train.guards import spikes
from olmo_train.model.adapter import adapt, is_adapter
from olmo_train.model.config import AdapterConfig
from olmo_train.parallel import shard
from olmo_train.run.resume import check_changes
from olmo_train.storage import hash_file
from olmo_train.tools.replay import replay
from olmo_train.train_config import TrainConfig

STEPS = 4  # of most runs here, with a checkpoint after each second one


@pytest.fixture(scope="module")
def place(tmp_path_factory, stream):
    """A folder with the tokens and `base`, the run_dir of a short run."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "tokens.npy").write_bytes(stream)
    words = words_of(folder / "base", folder / "tokens.npy", total_steps=2, **{"optim.warmup_steps": 1})
    trained(configuration.load(TrainConfig, [], words))
    return folder


@pytest.fixture(scope="module")
def base(place):
    return place / "base"


@pytest.fixture(scope="module")
def adapter_args(place):
    """adapter_args(name, kind, **changes): the configuration of a run that adapts the base."""

    def args(name: str, kind: str = "lora", **changes):
        values = {"total_steps": STEPS, "optim.warmup_steps": 1, "checkpoint.interval_steps": 2, "adapter.kind": kind,
                  "adapter.rank": 4, "init_from": place / "base"}  # fmt: skip
        return configuration.load(TrainConfig, [], words_of(place / name, place / "tokens.npy", **values | changes))

    return args


@pytest.fixture(scope="module")
def runs(adapter_args):
    """{kind: (configuration, frozen weights after the last step, names of the parameters with moments)} of finished runs, which
    saved step 0 too."""
    found, ordinary = {}, training.train_step

    def train_step(model, optimizer, *others):
        stats = ordinary(model, optimizer, *others)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        seen[0] = {name: p.full_tensor() for name, p in model.named_parameters() if not is_adapter(name)}
        seen[1] = {names[id(parameter)] for parameter in optimizer.state}
        return stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_step", train_step)
        for kind in ("lora", "dora"):
            seen = [{}, set()]
            found[kind] = (trained(adapter_args(f"whole-{kind}", kind, **{"checkpoint.save_steps": "[0]"})), *seen)
    return found


def weights_of(config, step: int) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in states_of(config.run_dir, step).items() if name.startswith("model.")}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- training


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_every_adapter_moves_within_two_steps_and_the_frozen_weights_stay(runs, base, kind):
    config, frozen, moments = runs[kind]
    plain = dict(load_model(base).named_parameters())
    assert same(frozen, plain)
    before, after = weights_of(config, 0), weights_of(config, 2)
    assert {f"model.{name}" for name in moments} == before.keys() == after.keys()
    assert len(moments) == 2 * 7 * (3 if kind == "dora" else 2) and all(is_adapter(name) for name in moments)
    assert all((after[name] - before[name]).abs().max() > 0 for name in before)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputed_activations_train_the_same_bits(runs, adapter_args, checkpointing):
    """So every adapter moves with them too."""
    config = cut(adapter_args(checkpointing, "dora", **{"parallel.activation_checkpointing": checkpointing}), 2)
    assert same(states_of(config.run_dir, 2), states_of(runs["dora"][0].run_dir, 2))


@pytest.mark.parametrize("size", first_quick([2, 4]))
def test_processes_and_micro_batches_train_the_same_adapters(runs, adapter_args, size):
    """Within rounding, and with determinism: world the same bits. Two steps, as A moves from the second on."""
    short = {"total_steps": 2, "optim.schedule_steps": STEPS}
    exact = short | {"determinism": "world"}

    def run(name, world=None, **changes):
        return trained(adapter_args(f"{name}-{world.size if world else f'beside-{size}'}", "dora", **changes), world).run_dir

    on_ranks(size, lambda world: [run("rows", world, micro_batch_size=2, **short), run("exact", world, **exact)])
    alone, ranks = run("exact", **exact), [adapter_args(f"{name}-{size}").run_dir for name in ("rows", "exact")]
    assert same(states_of(ranks[1], 2), states_of(alone, 2))
    whole = Path(runs["dora"][0].run_dir)  # in micro-batches of 4, the exact ones in micro-batches of 1
    weights, losses = load_model(folders.folder_of(whole, 2)).state_dict(), history(whole, LOSS)[:2]
    for run_dir in (alone, *ranks):
        assert [loss for (loss,) in history(run_dir, LOSS)] == pytest.approx([loss for (loss,) in losses], rel=1e-6)
        merged = load_model(run_dir).state_dict()
        assert max(relative(merged[name], weights[name]) for name in weights) <= 1e-6


@pytest.mark.slow
def test_a_compiled_block_with_adapters_computes_the_same(runs, adapter_args):
    """test_compile.py counts the graphs. It takes minutes on a busy machine, as C++ is compiled."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    config = cut(adapter_args("compiled", "dora", **{"parallel.compile": "true"}), 2)
    expected = [loss for (loss,) in history(runs["dora"][0].run_dir, LOSS)[:2]]
    assert [loss for (loss,) in history(config.run_dir, LOSS)] == pytest.approx(expected, rel=1e-5)


FROZEN = "blocks.1.mlp.w_down.weight"


def test_one_bit_of_a_frozen_weight_or_an_adapter_of_one_replica_is_found(adapter_args):
    """No update would ever overwrite the bit of a frozen weight."""
    ordinary = training.train_step

    def run(world):
        world, found = in_replicas(world, 2), []
        for name in (FROZEN, "blocks.0.attn.wv.adapter.lora_a"):
            config = adapter_args(f"flip-{name}", **changes)
            training.train_step = ordinary
            flip_after(1, 1, world, name)
            with pytest.raises(ReplicaError) as problem:
                trained(config, world)
            found.append(str(problem.value))
        return found

    changes = {"parallel.replicas": 2, "parallel.precision": "bf16", "guards.replica_check_steps": 1, "micro_batch_size": 2}
    first, second = on_ranks(2, run)
    assert first == second
    assert all("after step 1 rank 0 (" in text and "and rank 1 (" in text for text in first)
    assert f"first in model.{FROZEN}" in first[0] and "first in model.blocks.0.attn.wv.adapter.lora_a" in first[1]


def test_a_spike_leaves_the_norms_of_the_adapters_and_rewinds(adapter_args, monkeypatch):
    monkeypatch.setattr(spikes, "LEAST", 2)
    real, seen = training.gradients.clip_gradients, []

    def clip(model, max_norm, **options):
        seen.append(1)
        for parameter in model.parameters() if len(seen) == 4 else ():
            if parameter.grad is not None:
                parameter.grad.mul_(1000)
        return real(model, max_norm, **options)

    monkeypatch.setattr(training.gradients, "clip_gradients", clip)
    changes = {"guards.spike": "rewind", "checkpoint.async_save": "false"}
    config = trained(adapter_args("spike", **changes))
    assert [event["step"] for event in events_of(config.run_dir, "rewind")] == [4]
    report = json.loads((Path(config.run_dir) / "forensics/step-0000004/gradients.json").read_text())
    assert {f"model.{name}" for name in report["parameters"]} == weights_of(config, STEPS).keys()


# ---- checkpoints


def test_a_killed_run_resumes_with_the_bits_of_one_that_was_not_and_its_steps_replay(runs, adapter_args):
    config = adapter_args("killed", "dora", **{"checkpoint.async_save": "false"})

    def train_to_step_3():
        for stats in training.train(config):
            if stats.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    assert exit_code(fork(train_to_step_3, os.devnull)) == -signal.SIGKILL
    trained(config)
    whole = runs["dora"][0]
    assert [event["step"] for event in events_of(config.run_dir, "resume")] == [2]
    assert history(config.run_dir) == history(whole.run_dir)
    assert same(states_of(config.run_dir, STEPS), states_of(whole.run_dir, STEPS))
    replayed = {step: replay(Path(config.run_dir), step) for step in (1, 4)}  # from the base, and from the checkpoint of step 2
    assert {step: (result.differing, bool(result.checkpoint)) for step, result in replayed.items()} == {
        1: ([], False),
        4: ([], True),
    }


@pytest.fixture(scope="module")
def finished(adapter_args):
    """The run_dir of a finished run with DoRA in bf16."""
    changes = {"total_steps": 2, "optim.peak_lr": 0.1, "parallel.precision": "bf16"}
    return Path(trained(adapter_args("finished", "dora", **changes)).run_dir)


def test_a_checkpoint_holds_adapters_and_names_its_base(finished, base):
    folder, plain = folders.newest_folder(finished), folders.newest_folder(base)
    record = folders.read_state(folder)["base"]
    sha256 = hash_file(plain / "MANIFEST.json")
    assert record == {"path": str(plain), "step": 2, "manifest_sha256": sha256, "dtype": "bf16"}
    tensors = states_of(finished, 2)
    del tensors["updates"]
    assert all(".adapter." in name for name in tensors)
    n_trained = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("model."))
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12 * n_trained + 1e6
    assert next(folder.glob("*.safetensors")).stat().st_size <= 12 * n_trained + 50_000


def test_load_model_merges_what_was_trained(finished, base):
    """Into the weights as they were trained with, rounded to bf16."""
    config, adapter = load_model(base).config, AdapterConfig("dora", rank=4)
    model = adapt(load_model(base).bfloat16().float(), adapter)
    tensors = states_of(finished, 2)
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
    args = lambda **changes: adapter_args("of-moved", **{"init_from": moved} | changes)  # noqa: E731
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
        load_model(args().run_dir)
    trained(args(**longer, init_from=base))
    load_model(args().run_dir)


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
    for key, value in {"adapter.rank": 5, "adapter.kind": "lora", "adapter.targets": "[wq,wv]"}.items():
        with pytest.raises(ConfigError, match=f"the adapters of {finished}.* have .*; set it to theirs") as problem:
            trained(adapter_args("other", "dora", init_from=None, resume_from=finished, **{key: value}))
        assert problem.value.where == key
    branch = adapter_args("branch", "dora", init_from=base, resume_from=finished, **{"parallel.precision": "bf16"})
    trained(branch)
    assert [line["step"] for line in lines_of(branch.run_dir)] == [3, 4]


# ---- mistakes


@pytest.mark.parametrize(
    "words, message",
    [
        ({"adapter.kind": "qlora"}, "adapter.kind: 'qlora' is not offered: it needs kernels for 4-bit weights; set lora"),
        ({"adapter.kind": "dpo"}, "adapter.kind: 'dpo' is not offered: it needs pairs of answers and a second model; set lora"),
        ({"dpo.beta": 0.1}, "dpo: is not offered: it needs pairs of answers and a second model; train on the preferred"),
        ({"adapter.dropout": 0.05}, "adapter.dropout: is not offered: .* blocks without random numbers; leave it out"),
        ({"adapter.targets": "[wq,embed]"}, "adapter.targets.1: 'embed' .* a tied head shares its weights.*; leave it out"),
        ({"adapter.targets": "[head]"}, "adapter.targets.0: 'head' .* a tied one is the embedding.*; leave it out"),
        ({"adapter.targets": "[wz]"}, "adapter.targets.0: 'wz' is not a choice; .*wq"),
        ({"adapter.targets": "[]"}, "adapter.targets: is empty; name some of wq, wk,"),
        ({"adapter.targets": "[w_gate]", "model.activation": "gelu"}, "adapter.targets: .* no gate; name some of wq, wk,"),
        ({"adapter.rank": 0}, "adapter.rank: must be at least 1, got 0"),
        ({"adapter.rank": 65}, "adapter.rank: 65 is above the smallest side of wq, which is 64 x 64; set at most 64"),
        ({"adapter.alpha": 0}, "adapter.alpha: must be finite and above 0, got 0"),
        ({"adapter.alpha": -16}, "adapter.alpha: must be finite and above 0, got -16"),
        ({"adapter.lr_ratio": 0.5}, "adapter.lr_ratio: must be finite and at least 1, got 0.5"),
        ({"adapter.kind": "none", "adapter.lr_ratio": 16}, "adapter.lr_ratio: 16 needs adapter.kind lora or dora; leave it out"),
        ({"parallel.float8": "true"}, "parallel.float8: computes no frozen weights beside adapters; leave it out with lora"),
        ({"optim.name": "muon"}, "optim.name: muon would orthogonalize .*; set adamw with adapter.kind lora"),
        ({"init_from": None}, "adapter.kind: lora needs weights to freeze; set init_from to a checkpoint or a run_dir"),
    ],
)
def test_a_mistake_ends_with_its_key_and_remedy(tiny_words, run_main, words, message):
    done = run_main("train", *tiny_words("run", **{"adapter.kind": "lora", "init_from": "base"} | words))
    assert done.returncode == 2
    assert re.match(f"error: {message}", done.stderr.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_a_base_of_another_shape_is_refused_by_its_key(adapter_args, base, kind):
    message = rf"is 160 here and was 176 when the weights of init_from were trained \({base}/.*\); set it back$"
    with pytest.raises(ConfigError, match=message) as problem:
        trained(adapter_args("other-shape", kind, **{"model.mlp_hidden": 160}))
    assert problem.value.where == "model.mlp_hidden"


def test_a_base_that_computed_something_else_is_refused_unless_it_is_allowed(adapter_args):
    """Its weights have the same shapes."""
    changes = {"model.n_heads": 8, "model.rope_theta": 500, "model.z_loss": 1e-4, "total_steps": 1}
    fix = r"set them back, or set allow_changes=\[model.n_heads,model.rope_theta\]$"
    message = r"is 8 here and was 4; model.rope_theta is 500.0 here and was 10000.0 when the weights .*; " + fix
    with pytest.raises(ConfigError, match=message) as problem:
        trained(adapter_args("other-heads", **changes))
    assert problem.value.where == "model.n_heads"
    trained(adapter_args("other-heads", **changes, allow_changes="[model]"))


def test_a_resumed_run_may_not_change_its_adapters(runs, adapter_args):
    changes = {"rank": 5, "alpha": 8, "rank_stabilized": True, "targets": "[wq]", "kind": "lora", "lr_ratio": 2}
    for name, value in changes.items():
        key = f"adapter.{name}"
        with pytest.raises(ConfigError, match="is .* now and was .*; set it back,.* another run_dir") as problem:
            trained(adapter_args("whole-dora", "dora", **{key: value}))
        assert problem.value.where == key
    for key in ("adapter.rank", "adapter.kind", "adapter.targets"):  # of which no value can be allowed
        with pytest.raises(ConfigError, match="would change the shape of the weights"):
            trained(adapter_args("whole-dora", "dora", **{key: changes[key[8:]], "allow_changes": f"[{key}]"}))


def test_a_run_without_adapters_may_change_the_keys_that_it_does_not_read(adapter_args):
    plain = {"init_from": None, "adapter.kind": "none"}
    changes = {"adapter.rank": 5, "adapter.alpha": 8, "adapter.targets": "[wq]"}
    before, after, lora = (
        configuration.to_dict(adapter_args("plain", **words))
        for words in (plain, plain | changes, plain | {"adapter.kind": "lora"})
    )
    check_changes(before, after, ())
    with pytest.raises(ConfigError, match="adapter.kind: is 'none' now and was 'lora'"):
        check_changes(lora, before, ())


def test_the_console_names_the_trained_parameters_and_counts_rows_of_zeros(adapter_args, monkeypatch, caplog, capsys):
    real = shard.init_adapters

    def zeroed(model, seed):
        with torch.no_grad():
            model.blocks[1].attn.wo.weight.to_local()[:3] = 0
        return real(model, seed)

    monkeypatch.setattr(shard, "init_adapters", zeroed)
    trained(adapter_args("zeros", "dora", total_steps=1))
    assert "3 rows of the adapted weights are zero: DoRA's m / |V| is 1 there" in caplog.text
    assert "dora: 11,200 of 165,888 parameters are trained" in capsys.readouterr().out
