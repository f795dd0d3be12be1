"""Strict configuration: what is merged, what is refused with which message, and that the defaults are the paper's recipe."""

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import first_quick

from olmo_train import config
from olmo_train.errors import ConfigError
from olmo_train.train_config import TrainConfig, find_keys, keys

LEAST = ["run_dir=runs/a", "data.sources.a.path=a.npy"]


def load(*words, files=()):
    return config.load(TrainConfig, list(files), [*LEAST, *words])


def refusal(*words, files=()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*words, files=files)
    return str(caught.value)


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


def test_a_config_that_names_only_data_and_run_dir_is_the_papers_recipe():
    run = load()
    model, optim = run.model, run.optim
    assert (model.d_model, model.n_layers, model.n_heads, model.mlp_hidden, model.seq_len) == (4096, 32, 32, 11008, 2048)
    assert (model.norm, model.norm_eps, model.activation, model.bias) == ("layer_norm_nonparametric", 1e-5, "swiglu", "none")
    assert (model.rope_theta, model.init, model.tie_embeddings) == (10_000.0, "mitchell", False)
    assert (model.vocab_size, model.padded_vocab_size) == (50280, 50304)
    assert (optim.name, optim.peak_lr, optim.betas, optim.eps) == ("adamw", 3e-4, (0.9, 0.95), 1e-5)
    assert (optim.weight_decay, optim.decay_embeddings, optim.decay_norms) == (0.1, False, False)
    assert (optim.schedule, optim.warmup_steps, optim.warmup_start_ratio, optim.final_lr_ratio) == ("linear", 5000, 0.1, 0.1)
    assert (optim.max_grad_norm, run.global_batch_size, run.seed) == (1.0, 2048, 6198)
    assert (run.parallel.precision, run.parallel.reduce_dtype, run.parallel.shard) == ("bf16", "fp32", "full")
    assert run.steps == 476838  # 2e12 tokens


def test_files_are_merged_left_to_right_and_words_come_last(tmp_path):
    first = write(tmp_path, "first.yaml", "seed: 1\nmodel: {n_layers: 4, d_model: 64}\noptim: {peak_lr: 0.1}\n")
    second = write(tmp_path, "second.yaml", "seed: 2\nmodel: {n_layers: 8}\n")
    run = load("optim.peak_lr=0.3", "model.n_heads=4", files=[first, second])
    assert (run.seed, run.model.n_layers, run.model.d_model, run.optim.peak_lr) == (2, 8, 64, 0.3)


def test_the_resolved_file_is_itself_a_valid_input(tmp_path):
    run = load("optim.peak_lr=1e-5", "total_tokens=2e9", "model.n_kv_heads=8", "optim.warmup_steps=10",
               "checkpoint.save_steps=[1,2,4]",
               "data.stages=[{from_step: 5, weights: {a: 2.0}}]", "log.wandb.tags=[007, 'true', '1e3']")  # fmt: skip
    file = write(tmp_path, "config.yaml", config.dump(run))
    assert config.load(TrainConfig, [file]) == run
    assert run.log.wandb.tags[1:] == ("true", "1e3")


@pytest.mark.parametrize(
    "text",
    ["2024_11_25", "20241125_103000", "0012", "1e5", "12e5678", "0123", "12:30:45", "2024-11-25", "no", "True", ".inf", "x=y",
     "run #3", "#3", "@home", "a: b: c", "!x", "*x", "%x", "a[/b]", "---"],
)  # fmt: skip
def test_a_text_key_takes_the_word_as_it_was_typed(text, tmp_path):
    run = load(f"run_dir={text}", f"log.wandb.name={text}", f"data.sources.a.path={text}")
    assert (run.run_dir, run.log.wandb.name, run.data.sources["a"].path) == (text, text, text)
    file = write(tmp_path, "config.yaml", config.dump(run))
    assert config.load(TrainConfig, [file]) == run
    assert config.decoded(config.read([file])) == config.to_dict(run) | {"run_dir": text}


def test_a_text_key_of_a_file_takes_its_scalar_as_it_was_typed(tmp_path):
    sources = "data: {sources: {no: {path: 20240101_00}, on: {path: [0012, 1.10]}, 1: {path: '3'}, null: {path: x}}}"
    text = f"run_dir: 12e5678\n{sources}\nlog: {{wandb: {{tags: [1.10, 007, yes], name: 12:30:45, group: null}}}}\n"
    run = config.load(TrainConfig, [write(tmp_path, "a.yaml", text)])
    assert (run.run_dir, run.log.wandb.name, run.log.wandb.group) == ("12e5678", "12:30:45", None)
    assert run.log.wandb.tags == ("1.10", "007", "yes")
    paths = {name: source.path for name, source in run.data.sources.items()}
    assert paths == {"no": "20240101_00", "on": ("0012", "1.10"), "1": "3", "null": "x"}
    assert config.load(TrainConfig, [write(tmp_path, "b.yaml", config.dump(run))]) == run


def test_only_null_and_a_leading_tilde_and_the_mark_of_a_missing_value_are_more_than_text(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    run = load("run_dir=~/r", "init_from=~/c", "data.sources.a.path=[~/a,b~]", "log.wandb.name=~/n", "data.deny=[~/d.txt]")
    assert (run.run_dir, run.init_from, run.log.wandb.name) == ("/home/me/r", "/home/me/c", "~/n")
    assert (run.data.deny, run.data.sources["a"].path) == (("/home/me/d.txt",), ("/home/me/a", "b~"))
    for word in ("null", "~", "Null", ""):
        assert load("log.wandb.name=x", f"log.wandb.name={word}").log.wandb.name is None
    assert load("log.wandb.name='null'").log.wandb.name == "null"
    assert refusal("run_dir=???") == "run_dir: is missing (???); set it"
    file = write(tmp_path, "a.yaml", "seed: ???\noptim: ???\n")
    assert refusal("optim.peak_lr=1", files=[file]) == "seed: is missing (???); set it"
    assert load("optim.peak_lr=1", "seed=3", files=[file]).seed == 3


def test_interpolations_take_the_type_of_their_key(monkeypatch, tmp_path):
    monkeypatch.setenv("STEPS", "1e3")
    file = write(tmp_path, "a.yaml", "seed: 7\nlog: {wandb: {name: 'run-${seed}', group: '${oc.env:STEPS}'}}\n")
    words = ("total_steps=${oc.env:STEPS}", "data.validation=${data.sources}", "data.sources.a.weight=0.5")
    run = load(*words, "run_dir=${oc.env:NONE,runs}/${seed}", "init_from=\\${seed}", files=[file])
    assert (run.total_steps, run.log.wandb.name, run.log.wandb.group, run.run_dir) == (1000, "run-7", "1e3", "runs/7")
    assert run.init_from == "${seed}" and run.data.validation == run.data.sources
    assert config.load(TrainConfig, [write(tmp_path, "b.yaml", config.dump(run))]) == run


def test_null_takes_back_what_an_earlier_file_named(tmp_path):
    first = write(tmp_path, "a.yaml", "data: {sources: {wiki: {path: w}, code: {path: c}}, validation: {wiki: {path: v}}}\n")
    second = write(tmp_path, "b.yaml", "data: {sources: {wiki: null}, validation: {wiki: }}\n")
    for run in (load(files=[first, second]), load("data.sources.wiki=null", "data.validation.wiki=", files=[first])):
        assert list(run.data.sources) == ["code", "a"] and run.data.validation == {}
    assert load("data.sources.wiki=null", "data.sources.wiki.path=x", files=[first]).data.sources["wiki"].path == "x"


def test_relative_paths_of_a_run_are_found_from_another_folder(tmp_path, monkeypatch):
    project, other = tmp_path / "project[1]", tmp_path / "other"
    (project / "runs/r").mkdir(parents=True)
    other.mkdir()
    (project / "a0.npy").touch()
    monkeypatch.chdir(project)
    run = load("run_dir=runs/r", "data.sources.a.path=a0.npy", "data.sources.b.path=a*.npy", "data.validation.v.path=[a0.npy,x]")
    file = write(project / "runs/r", "config.yaml", config.dump(run, str(project)))
    assert config.load(TrainConfig, [file]) == run
    copy = write(other, "copy.yaml", file.read_text())
    monkeypatch.chdir(other)
    found = config.load(TrainConfig, [file])
    assert found.run_dir == str(project / "runs/r")
    assert [source.path for source in found.data.sources.values()] == [f"{project}/a0.npy", f"{tmp_path}/project[[]1]/a*.npy"]
    assert found.data.validation["v"].path == (f"{project}/a0.npy", "x")
    assert config.load(TrainConfig, [copy]).run_dir == "runs/r"  # another run, which takes the same data
    assert config.build(TrainConfig, config.words(config.to_dict(run), str(project))).data == found.data
    project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert config.load(TrainConfig, ["runs/r/config.yaml"]) == run


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().optim.peak_lr = 1.0


@pytest.mark.parametrize(
    "word, expected",
    [
        ("optim.peek_lr=1", "optim.peek_lr: is not a known key; did you mean 'optim.peak_lr'?"),
        ("modle.d_model=1", "modle: is not a known key; did you mean 'model'?"),
        ("data.sources.a.pth=b", "data.sources.a.pth: is not a known key; did you mean 'data.sources.a.path'?"),
        ("log.wandb.tag=[x]", "log.wandb.tag: is not a known key; did you mean 'log.wandb.tags'?"),
        ("model.norm=rmsnorm", "model.norm: 'rmsnorm' is not a choice; did you mean 'rms_norm'?"),
        ("optim.schedule=cosin", "optim.schedule: 'cosin' is not a choice; did you mean 'cosine'?"),
        ("data.order=shuffle", "data.order: 'shuffle' is not a choice; known: olmo, permute"),
        ("parallel.precision=fp16", "parallel.precision: 'fp16' is not a choice"),
        ("parallel.activation_checkpointing=some", "parallel.activation_checkpointing: 'some' is not a choice"),
        ("resume=never", "resume: 'never' is not a choice"),
    ],
)
def test_an_unknown_key_or_choice_is_refused_with_the_nearest_known_one(word, expected):
    assert refusal(word).startswith(expected)


@pytest.mark.parametrize(
    "word, expected",
    [
        ("seed=abc", "seed: must be a whole number, got 'abc'"),
        ("seed=1.5", "seed: must be a whole number, got 1.5"),
        ("seed=true", "seed: must be a whole number, got True"),
        ("seed=null", "seed: must be a whole number, got None"),
        ("seed.x=1", "seed: must be a whole number, got {'x': 1}"),
        ("total_steps=.inf", "total_steps: must be a whole number, got inf"),
        ("optim.peak_lr=fast", "optim.peak_lr: must be a number, got 'fast'"),
        ("optim.peak_lr=false", "optim.peak_lr: must be a number, got False"),
        ("optim.peak_lr=inf", "optim.peak_lr: must be finite and at least 0, got inf"),
        ("optim.peak_lr=-nan", "optim.peak_lr: must be finite and at least 0, got nan"),
        ("run_dir=", "run_dir: is empty; set run_dir=VALUE"),
        ("optim.betas=[0.9]", "optim.betas: must be a list of 2 values, got [0.9]"),
        ("optim.betas=0.9", "optim.betas: must be a list, got 0.9"),
        ("adapter.targets=wq,wv", "adapter.targets: must be a list, got 'wq,wv'; write [wq,wv]"),
        ("optim.betas=[0.9,x]", "optim.betas.1: must be a number, got 'x'"),
        ("parallel.compile=1", "parallel.compile: must be true or false, got 1"),
        ("model=olmo-7b", "model: must be a mapping of keys, got 'olmo-7b'"),
        ("data.sources=wiki", "data.sources: must be a mapping of names, got 'wiki'"),
        ("data.sources.a=null", "data.sources: names no data; set data.sources.NAME.path to a prepared folder or token file"),
        ("data.sources.b.weight=1", "data.sources.b.path: is missing and has no default; set it as data.sources.b.path=VALUE"),
        ("seed=-1", "seed: must be at least 0, got -1"),
        ("optim.peak_lr=.inf", "optim.peak_lr: must be finite and at least 0, got inf"),
        ("optim.betas=[0.9,1]", "optim.betas.1: must be at least 0 and below 1, got 1.0"),
        ("optim.max_grad_norm=0", "optim.max_grad_norm: must be above 0; .inf clips nothing, got 0.0"),
    ],
)
def test_a_wrong_type_or_range_is_refused_by_its_key(word, expected):
    assert refusal(word) == expected


@pytest.mark.parametrize(
    "word, key",
    [
        ("seed=-1", "seed"),
        ("data.seed=-1", "data.seed"),
        ("optim.peak_lr=-1", "optim.peak_lr"),
        ("optim.peak_lr=.inf", "optim.peak_lr"),
        ("optim.peak_lr=.nan", "optim.peak_lr"),
        ("optim.max_grad_norm=0", "optim.max_grad_norm"),
        ("optim.betas=[0.9,1.0]", "optim.betas.1"),
        ("optim.decay_steps=5", "optim.decay_steps"),
        ("model.n_heads=3", "model.n_heads"),
        ("model.n_kv_heads=5", "model.n_kv_heads"),
        ("model.n_kv_heads=0", "model.n_kv_heads"),
        ("model.head_dim=3", "model.head_dim"),
        ("model.head_dim=-2", "model.head_dim"),
        ("model.padded_vocab_size=50000", "model.padded_vocab_size"),
        ("model.bias=norm", "model.bias"),
        ("model.rope_theta=0", "model.rope_theta"),
        ("model.norm_eps=-1e-5", "model.norm_eps"),
        ("model.clip_qkv=0", "model.clip_qkv"),
        ("model.n_layers=0", "model.n_layers"),
        ("global_batch_size=0", "global_batch_size"),
        ("micro_batch_size=-4", "micro_batch_size"),
        ("total_steps=0", "total_steps"),
        ("total_tokens=-5", "total_tokens"),
        ("total_tokens=1e999", "total_tokens"),
        ("total_tokens=.nan", "total_tokens"),
        ("parallel.replicas=0", "parallel.replicas"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last"),
        ("checkpoint.interval_steps=0", "checkpoint.interval_steps"),
        ("log.interval_steps=0", "log.interval_steps"),
        ("eval.interval_steps=0", "eval.interval_steps"),
        ("guards.max_skipped=0", "guards.max_skipped"),
        ("guards.hang_seconds=-1", "guards.hang_seconds"),
        ("guards.skip_steps=[3,0]", "guards.skip_steps.1"),
        ("profile.start_step=0", "profile.start_step"),
        ("profile.steps=0", "profile.steps"),
        ("data.sources.a.path=''", "data.sources.a.path"),
        ("data.sources.a.dtype=int64", "data.sources.a.dtype"),
        ("data.sources.a.weight=-1", "data.sources.a.weight"),
        ("data.sources.a.weight=0", "data.sources"),
        ("data.sources.a.weight=.inf", "data.sources.a.weight"),
        ("data.sources.a.weight=.nan", "data.sources.a.weight"),
        ("data.stages=[{from_step: 1, weights: {a: 1}}]", "data.stages"),
        ("data.stages=[{from_step: 9, weights: {b: 1}}]", "data.stages.0.weights"),
        ("data.stages=[{from_step: 9, weights: {a: -1}}]", "data.stages.0.weights.a"),
        ("data.stages=[{from_step: 9, weights: {a: 0}}]", "data.stages.0"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_its_key(word, key):
    assert refusal(word).startswith(f"{key}: ")


def test_options_that_exclude_each_other_are_refused():
    assert refusal("total_steps=5", "total_tokens=1e9").startswith("total_tokens: ")
    assert refusal("resume_from=a", "init_from=b").startswith("init_from: ")
    assert refusal("data.order=olmo", "data.sources.b.path=b", "data.sources.b.weight=2").startswith("data.order: ")
    assert refusal("total_tokens=1e9").startswith("optim.warmup_steps: 5000 fills the whole run of 239 steps")


def test_numbers_may_be_written_as_people_write_them():
    run = load("total_tokens=2e12", "global_batch_size=2e3", "optim.peak_lr=1", "micro_batch_size=8.0")
    assert run.global_batch_size == 2000 and isinstance(run.global_batch_size, int)
    assert run.optim.peak_lr == 1.0 and isinstance(run.optim.peak_lr, float)
    assert run.micro_batch_size == 8
    assert load("total_steps=010").total_steps == 10  # as `seq -w` writes them, and not octal
    assert load("micro_batch_size=1_000").micro_batch_size == 1000
    assert "between -2^63 and 2^63 - 1" in refusal("seed=" + "9" * 20) and "whole number" in refusal("seed=" + "9" * 5000)


def test_a_path_may_be_one_text_or_a_list():
    assert load("data.sources.a.path=[x,y]").data.sources["a"].path == ("x", "y")
    assert load("data.sources.a.path=x=y").data.sources["a"].path == "x=y"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a: [1", "is not valid YAML"),
        ("- 1\n- 2\n", "must be a mapping of keys"),
        ("a: &a {b: *a}", "an alias refers to itself"),
        ("? [a, b]\n: 1\n", "line 1: a key must be text"),
        ("a: !!python/object:os.system {}", "the tag 'tag:yaml.org,2002:python/object:os.system' is not known"),
        ("[" * 9999, "nested too deeply"),
        ("a: 1\n---\na: 2\n", "is not valid YAML"),
        ("seed: 1\nseed: 2\n", "is not valid YAML"),
        ("\x00\x01", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_by_its_name(tmp_path, text, expected):
    file = write(tmp_path, "bad.yaml", text)
    message = refusal(files=[file])
    assert message.startswith(f"{file}: ") and expected in message and "\n" not in message


def test_what_is_no_file_and_no_word_is_refused(tmp_path):
    none = "there is no such configuration file; "
    assert refusal(files=[tmp_path / "none.yaml"]) == f"{tmp_path}/none.yaml: {none}name a YAML file, or set a key as KEY=VALUE"
    write(tmp_path, "model.yaml", "")
    assert refusal(files=[tmp_path / "modle.yaml"]).endswith(f"{none}did you mean '{tmp_path}/model.yaml'?")
    assert refusal(files=[tmp_path]) == f"{tmp_path}: is a folder, not a YAML file; name a YAML file in it"
    write(tmp_path, "config.yaml", "")
    assert refusal(files=[tmp_path]).endswith(f"is a folder, not a YAML file; did you mean '{tmp_path}/config.yaml'?")
    assert refusal("=3").endswith("is neither a YAML file nor key=value")
    assert refusal("optim.betas=[").startswith("optim.betas: cannot be set to '['")
    assert "nothing" in refusal("data.sources.a.path=${nothing}")


def test_a_batch_that_cannot_be_divided_is_refused_with_the_fix():
    run = load("global_batch_size=100", "micro_batch_size=4")
    with pytest.raises(ConfigError) as caught:
        run.check_world(8)
    assert str(caught.value) == "global_batch_size: 100 is not a multiple of the 8 processes; use 96 or 104"
    run.check_world(5)
    with pytest.raises(ConfigError, match="use 200$"):
        run.check_world(200)


@pytest.mark.parametrize(
    "batch, most, processes, used", [(100, 4, 5, 4), (100, 8, 1, 5), (8, 8, 2, 4), (6, 16, 1, 6), (7, 4, 1, 1)]
)
def test_the_micro_batch_is_lowered_to_one_that_divides_the_rows_of_a_process(batch, most, processes, used):
    run = load(f"global_batch_size={batch}", f"micro_batch_size={most}")
    assert run.micro_batch_on(processes) == used
    said = [f"micro_batch_size {most} is lowered to {used}, which divides the {batch // processes} instances of a process"]
    assert run.batch_notes(processes) == (said if used < most else [])


def test_a_batch_that_is_not_set_follows_from_the_parameters_and_the_run_says_so():
    def shape(width):
        words = {"d_model": width, "n_heads": 4, "n_layers": 4, "mlp_hidden": 8 * width // 3 // 16 * 16, "seq_len": 512}
        return [f"model.{key}={value}" for key, value in (words | {"vocab_size": 4096, "padded_vocab_size": 4096}).items()]

    assert [load(*shape(width)).global_batch_size for width in (16, 64, 256, 1024)] == [8, 16, 64, 512]
    assert load("model.seq_len=4096").global_batch_size == 1024  # the same tokens
    (said,) = load(*shape(256)).batch_notes(1)
    assert said == "global_batch_size is not set: 64 instances, 32,768 tokens per step, for a model of 5,210,112 parameters"
    named = load(*shape(256), "global_batch_size=64")
    assert named == load(*shape(256)) and named.batch_notes(1) == []  # and saved configurations hold the number
    assert refusal("global_batch_size=0").startswith("global_batch_size: must be at least 1")


WSD = ("global_batch_size=10", "model.seq_len=100", "total_tokens=100_500", "optim.schedule=wsd")


def test_lengths_in_tokens_are_rounded_to_whole_steps():
    """1000 tokens a step: a run of 101 steps."""

    def lengths(*words):
        optim = load(*WSD, *words).in_steps().optim
        assert optim.warmup_tokens is optim.schedule_tokens is optim.decay_tokens is None
        return optim.warmup_steps, optim.schedule_steps, optim.decay_steps

    short = "optim.warmup_steps=5"
    assert lengths("optim.warmup_tokens=9_000") == (9, None, None) and lengths("optim.warmup_tokens=9_001") == (10, None, None)
    assert lengths(short, "optim.decay_tokens=20e3") == (5, None, 20) and lengths(short, "optim.decay_tokens=20_001")[2] == 21
    assert lengths(short, "optim.schedule_tokens=49_500", "optim.decay_tokens=45e3") == (5, 50, 45)
    assert load(*WSD, short).in_steps() == load(*WSD, short, "total_tokens=null", "total_steps=101")


def test_a_decay_that_cannot_be_is_refused():
    short, room = (
        "optim.warmup_steps=5",
        "is longer than the 96 steps between the warmup and the end of the schedule; set it lower",
    )
    assert load(*WSD, short, "optim.decay_steps=96").in_steps().optim.decay_steps == 96
    assert refusal(*WSD, short, "optim.decay_steps=97") == f"optim.decay_steps: 97 {room}, or train longer"
    assert refusal(*WSD, short, "optim.decay_tokens=96_001").startswith(f"optim.decay_tokens: 96001 {room}")
    assert refusal(*WSD, short, "optim.decay_tokens=1e9").startswith(f"optim.decay_tokens: 1e+09 {room}")
    assert "45 steps between" in refusal(*WSD, short, "optim.schedule_steps=50", "optim.decay_steps=46")
    both = "and optim.decay_steps 9 are both set; leave one out (optim.decay_steps is set by command line)"
    assert refusal(*WSD, short, "optim.decay_steps=9", "optim.decay_tokens=9e3") == f"optim.decay_tokens: 9000 {both}"
    assert "optim.warmup_steps 5 are both set" in refusal(*WSD, short, "optim.warmup_tokens=9e3")
    for word in ("decay_steps=5", "decay_tokens=5e3", "decay_shape=1-sqrt"):
        key = f"optim.{word.partition('=')[0]}"
        assert refusal(f"optim.{word}") == f"{key}: is read with schedule: wsd only, not linear; leave it out"
    assert refusal(*WSD, short, "optim.decay_shape=sqrt").startswith("optim.decay_shape: 'sqrt' is not a choice; did you mean")
    assert refusal(*WSD, short, "optim.decay_tokens=0").startswith("optim.decay_tokens: must be finite and above 0")


def test_flatten_names_every_leaf():
    values = {"a": 1, "b": {"c": [1, {"d": 2}], "e": {}, "f": {"g": None}}}
    assert config.flatten(values) == {"a": 1, "b.c": [1, {"d": 2}], "b.e": {}, "b.f.g": None}


def test_a_removed_key_of_a_saved_configuration_is_read_back_but_has_no_other_value():
    assert load("model.position=rope", "log.wandb.artifacts=false") == load()
    assert refusal("model.position=learned").startswith("model.position: was removed")


def test_every_key_has_a_meaning_and_its_default_can_be_typed():
    assert [key.name for key in keys() if not key.meaning] == []
    run = config.flatten(config.to_dict(load()))
    typed = {key.name: f"{key.name}={key.default}" for key in keys()}
    assert run.keys() - typed.keys() == {f"data.sources.a.{key}" for key in ("path", "weight", "dtype")}
    set_above = ("data.", "run_dir", "batch_schedule.N")
    assert load(*(word for name, word in typed.items() if not name.startswith(set_above))) == load()


def test_keys_are_found_by_the_start_of_their_name():
    assert [tuple(key) for key in find_keys("optim.peak")] == [
        ("optim.peak_lr", "float, finite and at least 0", "0.0003", "learning rate at the end of the warmup")
    ]
    (key,) = find_keys("profile.start")
    assert key.kind == "int, at least 1 | null" and key.meaning.startswith(
        "first step to trace; null: none. Traces are in run_dir"
    )
    for prefix, near in (("peak", "optim.peak_lr"), ("optim.peek_lr", "optim.peak_lr"), ("optin", "optim"), ("!", "known: ")):
        with pytest.raises(ConfigError, match=f"^--keys: no key starts with '{prefix}'; .*{near}"):
            find_keys(prefix)


# ---- for any YAML file or word, the loader returns a configuration or refuses it in one line

KEYS = sorted(config.flatten(config.to_dict(config.load(TrainConfig, [], ["run_dir=r", "data.sources.a.path=x"]))))
KEYS += ["model", "data", "optim.betas", "data.sources", "data.sources.a", "data.stages", "log.wandb", "nothing", "a.b", ".", ""]
VALUES = ["null", "~", "~/x", "", "no", "on", "true", "1", "010", "0x1", "-1", "1e3", "1e999", "9" * 400, "2024_11_25", "12e5678",
          "12:30:45", ".nan", "-.inf", "???", "${seed}", "${", "${oc.env:HOME}", "${a.b}", "\\${x}", "[1, 2]", "{a: 1}",
          "{a: {path: b}}", "[x", "'", '"\\x"', '"\\0"', '"\\ud800"', '"\\UFFFFFFFF"', "&a [*a]", "*a", "!!set {a}", "!x y",
          "- 1", "a: b", "# c", "@", "---", "adamw", "muon", "olmo", "[{from_step: 5, weights: {a: 2}}]", "!!binary aGk=", "<<",
          "=", "a\nb", "\u2028", "\ufeff", "\x85"]  # fmt: skip
TEXT = st.one_of(st.sampled_from(VALUES), st.text(max_size=8), st.integers().map(str), st.floats().map(repr))
WORDS = st.tuples(st.one_of(st.sampled_from(KEYS), st.text(max_size=6)), TEXT).map("=".join)


@st.composite
def yaml_files(draw) -> bytes:
    """A file of known keys with odd values, in blocks or flows, and sometimes with bytes changed."""
    lines = []
    for key, value in draw(st.lists(st.tuples(st.sampled_from(KEYS), TEXT), max_size=4, unique_by=lambda pair: pair[0])):
        parts = key.split(".")
        lines.append(": {".join(parts) + ": " + value + "}" * (len(parts) - 1))
    content = draw(st.sampled_from(["\n", "\r\n", "\n---\n"])).join(lines).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) < 3:
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=6)) + content[at:]
    return content


@pytest.mark.parametrize("examples", first_quick([200, 2000]))
def test_any_file_and_words_are_a_configuration_or_one_error(tmp_path, examples):
    file = tmp_path / "fuzz.yaml"

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(yaml_files(), st.lists(WORDS, max_size=4))
    def check(content, words):
        file.write_bytes(content)
        try:
            loaded = config.load(TrainConfig, [file], ["run_dir=r", "data.sources.a.path=x", *words])
        except ConfigError as problem:
            assert str(problem)
            return
        file.write_bytes(config.dump(loaded).encode())
        assert config.load(TrainConfig, [file]) == loaded
        assert config.decoded(config.read([file])) == config.to_dict(loaded)

    check()


def test_the_error_of_two_keys_that_exclude_each_other_names_the_file(tmp_path):
    file = write(tmp_path, "tiny.yaml", "total_steps: 200\n")
    said = refusal("total_tokens=1e3", files=[file])
    assert said == (
        f"total_tokens: 1000 and total_steps 200 are both set; leave one out, as total_steps=null (total_steps is set by {file})"
    )
    assert load("total_tokens=1e9", "total_steps=null", "optim.warmup_steps=5", files=[file]).total_tokens == 1e9
    assert refusal("init_from=a", "resume_from=b").endswith("as resume_from=null (resume_from is set by command line)")


def test_invalid_yaml_is_shown_with_its_lines_and_no_name_of_a_library(tmp_path):
    said = refusal(files=[write(tmp_path, "bad.yaml", "model:\n  d_model: [1,\n")])
    assert (
        "bad.yaml: is not valid YAML: " in said and "at line 3, column 1" in said and "<" not in said.partition("YAML: ")[2][:60]
    )
    assert " string>" not in said + refusal("optim.betas=[0.9,")
