import http.server
import sys
import threading
from functools import partial

import fsspec
import numpy as np
import pytest
from data_sources import flip_bit, prepare_source

from olmo_train.data import remote
from olmo_train.data.config import SourceConfig
from olmo_train.data.shards import open_source
from olmo_train.errors import ConfigError, DataError
from olmo_train.storage import cache_folder


class Handler(http.server.SimpleHTTPRequestHandler):
    requests: list[str] = []

    def log_message(self, *_):
        self.requests.append(self.path)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local HTTP server of tmp_path/served; the cache is tmp_path/cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Handler, "requests", [])
    monkeypatch.setattr(remote, "PAUSES", (0, 0))
    (tmp_path / "served").mkdir()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "served")))
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}", tmp_path / "served"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_a_remote_folder_is_the_local_one(server):
    url, served = server
    folder, _ = prepare_source(served)
    here = open_source("test", SourceConfig(str(folder)), 280)
    there = open_source("test", SourceConfig(f"{url}/source"), 280)
    assert there.fingerprint == here.fingerprint
    assert there.find_documents({"doc-7"})[0].start == here.find_documents({"doc-7"})[0].start
    Handler.requests.clear()
    open_source("test", SourceConfig(f"{url}/source"), 280)
    assert [path for path in Handler.requests if "tokens-" in path or path.endswith("parquet")] == []


def test_a_remote_shard_whose_hash_is_another_is_refused(server):
    url, served = server
    folder, _ = prepare_source(served)
    flip_bit(folder / "tokens-00001.bin", 7)
    with pytest.raises(DataError, match=r"tokens-00001.bin: sha256 is .* meta.json says"):
        open_source("test", SourceConfig(f"{url}/source"), 280)
    assert not list(cache_folder().rglob("tokens-00001.bin*[!k]"))
    assert not list(cache_folder().rglob("*.tmp"))


def test_a_remote_folder_that_was_prepared_again_is_fetched_again(server):
    url, served = server
    prepare_source(served)
    before = open_source("test", SourceConfig(f"{url}/source"), 280).fingerprint
    for file in (served / "source").iterdir():
        file.unlink()
    folder, _ = prepare_source(served, max_shard_tokens=500)
    after = open_source("test", SourceConfig(f"{url}/source"), 280).fingerprint
    assert after == open_source("test", SourceConfig(str(folder)), 280).fingerprint != before


def test_a_remote_raw_file_is_fetched_once_and_again_when_its_size_changes(server):
    url, served = server
    np.arange(100, dtype=np.uint16).tofile(served / "a.npy")
    assert open_source("test", SourceConfig((f"{url}/a.npy",)), 280).n_tokens == 100
    assert open_source("test", SourceConfig((f"{url}/a.npy",)), 280).n_tokens == 100
    np.arange(50, dtype=np.uint16).tofile(served / "a.npy")
    assert open_source("test", SourceConfig(f"{url}/a.npy"), 280).n_tokens == 50


def test_a_transfer_that_breaks_off_is_refused(server, monkeypatch):
    url, served = server
    np.arange(100, dtype=np.uint16).tofile(served / "a.npy")
    monkeypatch.setattr(Handler, "copyfile", lambda self, source, target: target.write(source.read(150)))
    with pytest.raises(DataError, match=r"a.npy: 150 bytes arrived of 200"):
        remote.localize(f"{url}/a.npy")
    assert not list(cache_folder().rglob("a.npy*[!k]"))
    assert Handler.requests == ["/a.npy"] * 3


def test_a_transfer_that_breaks_off_once_is_repeated(server, monkeypatch, caplog):
    url, served = server
    np.arange(100, dtype=np.uint16).tofile(served / "a.npy")
    sizes = iter([150, 200])
    monkeypatch.setattr(Handler, "copyfile", lambda self, source, target: target.write(source.read(next(sizes))))
    assert open_source("test", SourceConfig(f"{url}/a.npy"), 280).n_tokens == 100
    assert "a.npy: 150 bytes arrived of 200" in caplog.text


def test_a_copy_is_used_when_the_server_is_away(server):
    url, served = server
    np.arange(100, dtype=np.uint16).tofile(served / "a.npy")
    local = remote.localize(f"{url}/a.npy")
    assert remote._still_good("http://127.0.0.1:9/a.npy", remote.Path(local), None)


def test_a_missing_remote_file_is_named(server):
    url, _ = server
    with pytest.raises(DataError, match=r"none.npy: cannot be fetched: HTTPError"):
        remote.localize(f"{url}/none.npy")
    assert len(Handler.requests) == 2  # the server logs an error and the request; there is no second try
    with pytest.raises(ConfigError, match="HTTP cannot list files"):
        remote.localize(f"{url}/*.npy")


def test_other_schemes_go_through_fsspec_globs_included(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for i in range(2):
        memory.pipe(f"/bucket/part-{i}.npy", np.full(10, i, np.uint16).tobytes())
    source = open_source("test", SourceConfig("memory://bucket/part-*.npy"), 280)
    out = np.zeros(20, np.int64)
    source.read(0, out)
    assert out.tolist() == [0] * 10 + [1] * 10
    with pytest.raises(ConfigError, match="cannot be opened"):
        remote.localize("nowhere://bucket/a.npy")


def test_a_filesystem_whose_package_is_missing_names_the_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"s3://bucket/a.npy: cannot be opened: Install s3fs.*; pip install s3fs"):
        remote.localize("s3://bucket/a.npy")
