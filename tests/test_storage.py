"""Files that are whole or not there, hashes that tell what a disk did, and one run at a time."""

import json
import os
import subprocess
import sys

import pytest
from data_sources import flip_bit

from olmo_train import storage
from olmo_train.errors import ConfigError
from olmo_train.storage import commit_folder, lock_run_dir, problems_of, remove_folder, replace_file, write_file


@pytest.fixture
def folder(tmp_path):
    """A committed folder of two files."""
    temporary = tmp_path / ".step.tmp"
    temporary.mkdir()
    entries = {name: write_file(temporary / name, content) for name, content in (("a.bin", b"aaaa" * 100), ("b.json", b"{}"))}
    commit_folder(temporary, tmp_path / "step", entries)
    return tmp_path / "step"


def test_a_committed_folder_verifies(folder):
    assert problems_of(folder) == []
    assert sorted(os.listdir(folder)) == ["MANIFEST.json", "a.bin", "b.json"]
    assert not folder.with_name(".step.tmp").exists()


@pytest.mark.parametrize("at", [0, 200, 399])
def test_a_flipped_bit_is_reported_with_the_files_name(folder, at):
    flip_bit(folder / "a.bin", at)
    assert problems_of(folder) == ["a.bin does not have the hash of what was written"]


def test_every_other_damage_is_reported(folder):
    (folder / "a.bin").write_bytes(b"aaaa" * 99)
    (folder / "b.json").unlink()
    assert problems_of(folder) == ["a.bin has 396 bytes, expected 400", "b.json is missing"]


@pytest.mark.parametrize(
    "manifest, why",
    [
        (b"", "it is not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"\x00", "it is not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"[" * 100_000, "it is not JSON: "),
        (b'{"secret": "\xff"}', "byte 12 is not UTF-8"),
        (b"[]", "it does not list names, sizes and hashes"),
        (b"{}", "it does not list names, sizes and hashes"),
        (b'{"format": 1, "files": []}', "it does not list names, sizes and hashes"),
        (b'{"format": 1, "files": {"a.bin": {}}}', "it does not list names, sizes and hashes"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_named_in_one_line(folder, manifest, why):
    (folder / "MANIFEST.json").write_bytes(manifest)
    (problem,) = problems_of(folder)
    assert problem.startswith(f"MANIFEST.json cannot be read: {why}") and "secret" not in problem and len(problem) < 150


def test_a_file_that_no_reader_opens_is_ignored_with_one_warning(folder, caplog):
    (folder / "evaluation.json").write_bytes(b"{}")
    (folder / ".DS_Store").touch()
    (folder / "logs").mkdir()
    assert problems_of(folder, contents=False) == [] and caplog.text == ""
    assert problems_of(folder) == []
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{folder} holds files that are not in the manifest, and ignored: .DS_Store, evaluation.json, logs"
    )


@pytest.mark.parametrize("name", ["more.safetensors", "tokenizer.json", "state.json", "config.yaml"])
def test_a_file_that_a_reader_would_open_must_be_in_the_manifest(folder, name, tmp_path):
    (tmp_path / "outside").touch()
    (folder / name).symlink_to(tmp_path / "outside")
    assert problems_of(folder) == [f"{name} is not in the manifest"]


def test_any_flipped_byte_of_the_manifest_changes_nothing_silently(folder):
    """The flip is reported as damage, or it is where nothing depends on it, and the rest still verifies."""
    file = folder / "MANIFEST.json"
    good = file.read_bytes()
    entries = json.loads(good)["files"]
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 0x02
        file.write_bytes(bad)
        if not problems_of(folder):
            assert json.loads(file.read_bytes())["files"] == entries


def test_a_manifest_cannot_lead_out_of_the_folder(folder, tmp_path):
    (tmp_path / "outside").write_bytes(b"x")
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["files"]["../outside"] = write_file(tmp_path / "outside", b"x")
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    assert problems_of(folder) == ["../outside leads out of the folder"]


def test_links_count_as_the_files_that_they_point_to(folder, tmp_path, caplog):
    """As huggingface_hub's cache lays out a download: every file is a link to blobs/HASH."""
    for name in ("a.bin", "b.json", "MANIFEST.json"):
        (folder / name).rename(tmp_path / f"blob-{name}")
        (folder / name).symlink_to(f"../blob-{name}")
    assert problems_of(folder) == []
    (record,) = caplog.records
    assert record.getMessage() == f"{folder} holds files that are links, whose contents verify: a.bin, b.json"
    (tmp_path / "blob-a.bin").write_bytes(b"aaab" * 100)
    (tmp_path / "blob-b.json").unlink()
    assert problems_of(folder) == ["a.bin does not have the hash of what was written", "b.json is missing"]
    (tmp_path / "blob-MANIFEST.json").unlink()
    assert problems_of(folder) == ["MANIFEST.json is missing"]


def test_removing_a_folder_does_not_follow_symlinks(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    (folder / "link").symlink_to(outside)
    remove_folder(folder)
    assert not folder.exists() and (outside / "precious").exists()
    link = tmp_path / "step-2"
    link.symlink_to(outside)
    remove_folder(link)
    assert not link.is_symlink() and (outside / "precious").exists()


def test_a_removal_that_was_interrupted_leaves_no_half_under_the_name(folder, monkeypatch):
    monkeypatch.setattr(storage.shutil, "rmtree", lambda *args, **kwargs: None)  # dies before it deletes anything
    remove_folder(folder)
    assert not folder.exists()
    assert problems_of(folder.with_name(".step.deleted")) == []


def test_replacing_a_file_leaves_no_other(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    replace_file(file, b"old")
    replace_file(file, b"new")
    assert file.read_bytes() == b"new" and os.listdir(tmp_path) == ["config.yaml"]

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(storage.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        replace_file(file, b"newer")
    assert file.read_bytes() == b"new" and os.listdir(tmp_path) == ["config.yaml"]


def test_all_is_flushed_before_a_folder_gets_its_name(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_rename = os.fsync, os.rename
    path = lambda descriptor: os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda d: calls.append(path(d)) or real_fsync(d))
    monkeypatch.setattr(os, "rename", lambda a, b: calls.append("rename") or real_rename(a, b))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    commit_folder(temporary, tmp_path / "final", {"a": write_file(temporary / "a", b"a")})
    assert calls == ["a", "MANIFEST.json", "temporary", "rename", tmp_path.name]


def test_one_run_at_a_time(tmp_path):
    message = rf"run_dir: {tmp_path} is in use by process {os.getpid()} on .* since"
    with lock_run_dir(tmp_path), pytest.raises(ConfigError, match=message):
        lock_run_dir(tmp_path).__enter__()
    with lock_run_dir(tmp_path):
        pass


def test_the_lock_of_a_killed_run_does_not_block(tmp_path):
    program = "from olmo_train.storage import *; import sys\nwith lock_run_dir(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=os.path.dirname(os.path.dirname(__file__)))
    assert killed.returncode == -9 and (tmp_path / ".lock").read_text().startswith("process ")
    with lock_run_dir(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """A user without HOME whose id is in no passwd file."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(storage.Path, "home", no_home)
    monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / f"olmo_train-{os.getuid()}"


def test_a_user_without_a_home_has_a_private_cache_in_the_temporary_folder(homeless):
    assert storage.cache_folder() == homeless and storage.cache_folder() == homeless
    assert homeless.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["open to others", "link", "file"])
def test_a_cache_that_another_user_may_have_put_there_is_refused(homeless, tmp_path, kind):
    if kind == "open to others":
        homeless.mkdir()
        homeless.chmod(0o777)
    elif kind == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        homeless.symlink_to(tmp_path / "theirs")
    else:
        homeless.touch(0o700)
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME: is not set, and .* may belong to another user"):
        storage.cache_folder()
