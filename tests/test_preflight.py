"""What a run says and refuses before its first step."""

import logging

import pytest

from olmo_train import hardware
from olmo_train.errors import ConfigError
from olmo_train.plan import preflight

GB = 10**9
WIDE = {"model.d_model": 4096, "model.n_layers": 8, "model.n_heads": 32, "model.mlp_hidden": 11008}


def machine(root, available_kb, cgroup=""):
    """A root folder with the files that say how much memory a machine has."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {available_kb} kB\nSwapFree: 1000 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    return root


def cgroup_files(root, folder, names, limit, used, cached):
    place = root / "sys/fs/cgroup" / folder
    place.mkdir(parents=True)
    for name, text in zip((*names[:2], "memory.stat"), (limit, used, f"anon 5\n{names[2]} {cached}\n"), strict=True):
        (place / name).write_text(str(text))


def test_available_memory_is_what_the_machine_and_its_cgroups_leave(tmp_path):
    assert hardware.available_memory(machine(tmp_path / "bare", 4000)) == 5000 * 1024
    assert hardware.available_memory(tmp_path / "other system") is None
    two = machine(tmp_path / "two", 4000, "0::/slurm/job\n")
    cgroup_files(two, "slurm", hardware._CGROUPS[0], 3_000_000, 2_500_000, 100_000)
    cgroup_files(two, "slurm/job", hardware._CGROUPS[0], "max", 1000, 10)
    assert hardware.available_memory(two) == 600_000
    one = machine(tmp_path / "one", 4000, "4:memory:/docker/a\n3:cpuset:/\n")
    cgroup_files(one, "memory/docker/a", hardware._CGROUPS[1], 2_000_000, 1_500_000, 7)
    assert hardware.available_memory(one) == 500_007


@pytest.fixture
def memory_gb(monkeypatch):
    return lambda gb: monkeypatch.setattr(preflight, "available_memory", lambda: None if gb is None else int(gb * GB))


def test_a_run_that_does_not_fit_is_refused_before_it_begins_and_leaves_no_run_dir(run_main, tiny_words, memory_gb, tmp_path):
    memory_gb(20)
    done = run_main("train", *tiny_words(**WIDE, total_steps=1))
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    (error,) = done.stderr.strip().splitlines()
    assert error.startswith("error: model: the run does not fit: ") and "20.00 GB available on this machine" in error


def test_the_keys_that_are_named_make_it_fit(tiny_args, memory_gb):
    long = {
        "model.seq_len": 2048,
        "global_batch_size": 64,
        "micro_batch_size": 64,
        "model.d_model": 512,
        "model.mlp_hidden": 1408,
    }
    config = tiny_args(**long)
    needed = preflight.memory_of(config, 1, 1).needed
    for gb, fix in ((needed / GB, ""), (needed / 3e9, "set micro_batch_size="), (1.0, "set micro_batch_size=")):
        memory_gb(gb)
        found = preflight.memory_of(config, 1, 1)
        assert found.fits is (fix == "") and found.fix.startswith(fix)
        if fix:
            with pytest.raises(ConfigError, match="micro_batch_size: the run does not fit"):
                preflight.check_memory(found, config)
            words = dict(word.split("=") for word in found.fix.split()[1:])
            assert preflight.memory_of(tiny_args(**long | words), 1, 1).fits
    memory_gb(20)
    fix = preflight.memory_of(tiny_args(**WIDE), 1, 1).fix
    layers = int(fix.split("model.n_layers=")[1].split()[0])
    fewer = {"model.n_layers": layers, "micro_batch_size": 1, "parallel.activation_checkpointing": "full"}
    assert preflight.memory_of(tiny_args(**WIDE | fewer), 1, 1).fits
    assert not preflight.memory_of(tiny_args(**WIDE | fewer | {"model.n_layers": layers + 1}), 1, 1).fits


def test_processes_of_one_machine_share_its_memory_and_an_unknown_memory_refuses_nothing(tiny_args, memory_gb):
    memory_gb(None)
    config = tiny_args()
    one, two = preflight.memory_of(config, 1, 1), preflight.memory_of(config, 2, 2)
    assert two.needed > one.needed + preflight.PROCESS_BYTES and one.fits is None
    preflight.check_memory(one, config)
    gpu = preflight.memory_of(config, 8, 8, gpu_bytes=80 * GB)
    assert gpu.fits and str(gpu).endswith("of 80.00 GB available on each GPU")


@pytest.fixture
def warns_then_refuses(memory_gb, caplog):
    """Checks that a run warns with so many bytes of memory, and is refused with so many."""

    def check(config, warned: float, refused: float) -> None:
        memory_gb(warned / GB)
        preflight.check_memory(preflight.memory_of(config, 1, 1), config)
        assert "may run out of memory" in caplog.text
        memory_gb(refused / GB)
        with pytest.raises(ConfigError):
            preflight.check_memory(preflight.memory_of(config, 1, 1), config)

    return check


def test_an_estimate_slightly_above_the_memory_is_a_warning(tiny_args, warns_then_refuses):
    config = tiny_args()
    needed = preflight.memory_of(config, 1, 1).needed
    warns_then_refuses(config, 0.95 * needed, 0.85 * needed)


def test_a_compiled_run_is_refused_only_if_it_would_not_fit_with_full_recomputation(tiny_args, warns_then_refuses):
    """How much less than its estimate it takes is not known."""
    changes = {"model.seq_len": 1024, "global_batch_size": 64, "micro_batch_size": 64, "parallel.compile": True}
    config, full = tiny_args(**changes), tiny_args(**changes | {"parallel.activation_checkpointing": "full"})
    needed, least = (preflight.memory_of(each, 1, 1).needed for each in (config, full))
    assert least < 0.7 * needed
    warns_then_refuses(config, 1.01 * least, 0.85 * least)


def test_adapters_of_olmo_7b_fit_a_gpu_that_its_full_training_does_not(tiny_args):
    olmo_7b = WIDE | {"model.n_layers": 32, "model.vocab_size": 50280, "model.padded_vocab_size": 50304}
    olmo_7b |= {"parallel.precision": "bf16"}
    full, lora = tiny_args(**olmo_7b), tiny_args(**olmo_7b | {"adapter.kind": "lora", "init_from": "base"})
    with pytest.raises(ConfigError, match="6,888,095,744 parameters, .* take 110.21 GB"):
        preflight.check_memory(preflight.memory_of(full, 1, 1, gpu_bytes=80 * GB), full)
    found = preflight.memory_of(lora, 1, 1, gpu_bytes=80 * GB)
    preflight.check_memory(found, lora)
    assert found.fits and 2 * 6_888_095_744 < found.needed < 40 * GB


def said(config, mixture=None):
    return [str(caution) for caution in preflight.cautions(config, mixture, on_cpu=True)]


def test_a_rate_that_never_reaches_its_peak_is_warned_of(tiny_args):
    assert said(tiny_args()) == []
    (full,) = said(tiny_args(total_steps=4))
    peak = "optim.warmup_steps 4 fills the whole run of 4 steps: the learning rate never reaches its peak"
    assert full == f"{peak}; set optim.warmup_steps to at most 3"
    assert said(tiny_args(total_steps=4, **{"optim.warmup_steps": 3})) == []
    record = logging.makeLogRecord({"levelname": "WARNING", "msg": full})  # of a caller that has not set up logging
    assert logging.lastResort.format(record) == f"WARNING: {full}"
    (low,) = said(tiny_args(**{"optim.warmup_steps": 8, "optim.schedule_steps": 8}))
    assert low.startswith("the learning rate never reaches optim.peak_lr 0.003: it is at most 0.00266")
    for schedule in ("cosine", "constant", "inverse_sqrt", "wsd"):
        assert said(tiny_args(**{"optim.schedule": schedule, "optim.warmup_steps": 0})) == []


def test_bf16_on_a_processor_without_it_is_warned_of(tiny_args, monkeypatch, tmp_path):
    config = tiny_args(**{"parallel.precision": "bf16"})
    for flags, few in (("flags : avx2 fma", 1), ("flags : avx2 avx512_bf16", 0), ("Features : asimd bf16", 0)):
        (tmp_path / "proc").mkdir(exist_ok=True)
        (tmp_path / "proc/cpuinfo").write_text(flags)
        monkeypatch.setattr(preflight, "computes_bf16", lambda: hardware.computes_bf16(tmp_path))
        assert len(said(config)) == few and list(preflight.cautions(config, None, on_cpu=False)) == []
    assert hardware.computes_bf16(tmp_path / "other system") is None


def test_many_epochs_and_a_vocabulary_that_is_too_large_are_warned_of(tiny_args):
    config = tiny_args(total_steps=400)
    mixture = config.mixture()
    (epochs,) = said(config, mixture)
    assert epochs.startswith("data.sources.a is read 5.13 times in the run; more than 4 epochs")
    config = tiny_args()
    mixture = config.mixture()
    meta = type("Meta", (), {"vocab_size": 300})
    mixture.sources[0].meta = meta
    assert said(config, mixture) == []
    meta.vocab_size = 200
    (rows,) = said(config, mixture)
    assert rows.startswith("model.vocab_size is 512, and the tokenizer of the data has 200 tokens: 39,936 of ")
    assert "set model.vocab_size=200" in rows


def test_the_first_lines_of_a_run_say_what_it_will_do(run_main, tiny_words):
    out = run_main("train", *tiny_words(total_steps=8)).stdout
    assert "8 steps of 512 tokens" in out and "epochs of each source over the run:  a 0.103" in out
    assert "warmup 4 of 8 steps (50%), peak learning rate 0.003" in out and "memory: needs about " in out
