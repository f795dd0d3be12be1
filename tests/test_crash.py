"""Killed anywhere in a save, a run resumes as if nothing had happened."""

import random
import shutil

import pytest
from crash import Death, run
from runs import first_quick, lines_of

from olmo_train.checkpoint.folders import committed

COMPARED = ("step", "train/CrossEntropyLoss", "optim/total_grad_norm", "optim/learning_rate_group0", "sample_hash", "skipped",
            "eval/v/CrossEntropyLoss")  # fmt: skip
# The evaluation in which each start of a run is stopped, of those in this process; 0: none. The run evaluates after steps 3
# and 6, and makes up for an interrupted evaluation first: each is interrupted twice.
STOPS = (1, 1, 2, 1, 0)


def history(run_dir):
    return [tuple(line.get(name) for name in COMPARED) for line in lines_of(run_dir)]


@pytest.fixture
def few_steps(tiny_words, tiny_tokens, tmp_path):
    """few_steps(name, **changes): the words of a run of six steps that saves every two, evaluates every three on five
    batches, and keeps one checkpoint."""
    held_out = tmp_path / "held-out.npy"
    held_out.write_bytes(tiny_tokens.read_bytes()[: 2 * 20 * 64 + 2])

    def words(name, **changes):
        small = {"total_steps": 6, "checkpoint.interval_steps": 2, "checkpoint.keep_last": 1, "model.n_layers": 1}
        small |= {"eval.interval_steps": 3, "data.validation.v.path": held_out}
        return tiny_words(name, **{**small, **changes}), tmp_path / name

    return words


def sweep(few_steps, world, deaths, rank=0, **changes):
    """Kill a rank of a run at each death, resume the run, and compare it with one that was left alone."""
    words, whole = few_steps("whole", **changes)
    codes, operations = run(words, whole, world, Death(rank))
    assert codes == [0] * world
    expected = history(whole)
    assert [line[0] for line in expected] == [1, 2, 3, 4, 5, 6]
    for number, death in enumerate(deaths(operations)):
        words, run_dir = few_steps(f"killed-{number}", **changes)
        codes, _ = run(words, run_dir, world, death)
        assert codes[death.rank] == -9, f"{death} was not reached: {codes}"
        finished = (run_dir / "checkpoints" / "step-0000006").exists()
        codes, _ = run(words, run_dir, world)
        assert codes == [0] * world, f"no resume after {death}: exit {codes}"
        assert history(run_dir) == expected, f"another history after {death}"
        names = {path.name for path in (run_dir / "checkpoints").iterdir()}
        if finished:  # there is no further save to clean up what this death left
            names = {name for name in names if not name.startswith(".")} - {"step-0000004"}
        assert names == {"step-0000006"}, f"left behind after {death}: {names}"


def story(few_steps, deaths, world=1, **changes):
    """Stop a run in each of its evaluations (STOPS). At each death, kill or stop one of its starts there besides, go on, and
    compare it with a run that was left alone."""
    words, whole = few_steps("whole", **changes)
    assert run(words, whole, world)[0] == [0] * world
    expected, before = history(whole), None
    assert [line[0] for line in expected if line[-1]] == [3, 6]
    for start, stop_in in enumerate(STOPS):
        words, after = copied(few_steps, f"after-{start}", before, **changes)
        codes, operations = run(words, after, world, Death(), stop_in)
        assert codes == [75 if stop_in else 0] * world
        for number, death in enumerate(deaths(operations)):
            words, run_dir = copied(few_steps, f"start-{start}-{number}", before, **changes)
            codes, _ = run(words, run_dir, world, death, stop_in)
            what = f"start {start}, {death}: exit {codes}"
            if death.stop:
                assert set(codes) <= {0, 75, 128 + 15}, what  # 143: a second signal leaves at once
            else:
                assert codes[0] == -9 or death.torn, f"not reached: {what}"  # there is not always a write left
            if 75 in codes:
                assert max(line[0] for line in history(run_dir) or [(0,)]) <= max(committed(run_dir), default=-1), what
            assert run(words, run_dir, world)[0] == [0] * world and history(run_dir) == expected, what
            content = (run_dir / "metrics.jsonl").read_bytes()
            assert run(words, run_dir, world)[0] == [0] * world and (run_dir / "metrics.jsonl").read_bytes() == content, what
            shutil.rmtree(run_dir)
        before = after
    assert history(before) == expected


def copied(few_steps, name, folder, **changes):
    """The words and the run_dir of a run that goes on from a copy of another one's folder, or starts."""
    words, run_dir = few_steps(name, **changes)
    if folder is not None:
        shutil.copytree(folder, run_dir)
    return words, run_dir


def some(operations, step, first=2, **kind):
    return [Death(at=at, **kind) for at in range(first, operations + 1, step)]


@pytest.mark.parametrize("async_save", first_quick([True, False]))
def test_killed_at_an_operation_of_a_save_a_run_resumes_bit_for_bit(few_steps, async_save):
    sweep(few_steps, 1, lambda operations: some(operations, 59), **{"checkpoint.async_save": async_save})


def test_a_power_cut_that_empties_unflushed_files_loses_nothing_committed(few_steps):
    sweep(few_steps, 1, lambda operations: some(operations, 61, power_cut=True))


def test_a_torn_write_is_never_taken_for_a_whole_one(few_steps):
    sweep(few_steps, 1, lambda operations: some(operations, 67, torn=True))


@pytest.mark.slow
@pytest.mark.parametrize("world, every", [(1, 61), (2, 151)])
@pytest.mark.parametrize("kind", [{}, {"stop": True}, {"power_cut": True}, {"torn": True}])
def test_stopped_in_evaluations_and_killed_or_stopped_besides_a_run_has_each_step_once(few_steps, kind, world, every):
    story(few_steps, lambda operations: some(operations, every, **kind), world)


@pytest.mark.slow
@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("kind", [{}, {"power_cut": True}, {"torn": True}])
def test_killed_at_every_operation_of_a_run(few_steps, async_save, kind):
    """Power cuts and torn writes at every second one: the even ones of synchronous saves, the odd ones of asynchronous ones."""
    step, first = (2, 2 + async_save) if kind else (1, 2)
    sweep(few_steps, 1, lambda operations: some(operations, step, first, **kind), **{"checkpoint.async_save": async_save})


@pytest.mark.slow
@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_killed_at_an_operation(few_steps, async_save, rank):
    every = (5, 1)[rank]  # rank 1 has fewer: its part of each save
    sweep(few_steps, 2, lambda operations: some(operations, every, rank=rank), rank, **{"checkpoint.async_save": async_save})


@pytest.mark.slow
def test_a_storm_of_kills_leaves_each_step_once(few_steps):
    words, whole = few_steps("whole", total_steps=40)
    codes, operations = run(words, whole)
    expected = history(whole)
    rng = random.Random(7)
    words, run_dir = few_steps("storm", total_steps=40)
    kills = 0
    for _ in range(8):
        codes, _ = run(words, run_dir, die=Death(at=rng.randrange(2, operations // 3)))
        kills += codes == [-9]
        done, kept = len(history(run_dir)), max(committed(run_dir), default=0)
        assert done - kept < 2 * 5  # a save is due every 5 steps, and is on the disk before the next one begins
    codes, _ = run(words, run_dir)
    assert codes == [0] and kills >= 6
    assert history(run_dir) == expected
