"""The W&B mirror of a run. Only this module imports wandb."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import uuid
from pathlib import Path
from typing import Any

from olmo_train.log.config import FACTS, WandbConfig
from olmo_train.log.version import code_version
from olmo_train.storage import replace_file

log = logging.getLogger(__name__)
MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}  # WANDB_MODE
PATIENCE = 30  # most seconds that a start or an end waits for W&B's server


def wandb_mode(config: WandbConfig) -> str:
    """online, offline or disabled. `auto` follows the environment; otherwise it is online with an API key. It never prompts."""
    if config.mode != "auto":
        return config.mode
    if os.environ.get("WANDB_DISABLED", "").strip().lower() not in ("", "0", "false", "no", "off"):
        return "disabled"
    if named := os.environ.get("WANDB_MODE", "").strip().lower():
        if named not in MODES:
            log.warning("WANDB_MODE '%s' is not one of %s; W&B stays offline", named, ", ".join(MODES))
        return MODES.get(named, "offline")
    import netrc
    from urllib.parse import urlsplit

    host = urlsplit(server_url()).hostname
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        return "online" if netrc.netrc().authenticators(host or "") else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def server_url() -> str:
    """The address of W&B's server."""
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def check_answers(url: str) -> None:
    """Raise OSError if no server answers at a URL: W&B's client takes far longer to find that out."""
    import ssl
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(url, timeout=PATIENCE / 3).close()
    except urllib.error.HTTPError:
        pass  # an answer too
    except urllib.error.URLError as problem:
        if not isinstance(problem.reason, ssl.SSLError):  # the client may have a certificate that Python does not
            raise OSError(f"{url}: {problem.reason}") from problem


class WandbMirror:
    """The run on Weights & Biases, under one id over all restarts, with each step once (docs/decisions/0006).

    Offline, a line waits until a checkpoint covers it, as a resume may compute it again; online it is sent at once. Lines that
    a killed attempt did not deliver are sent again from metrics.jsonl.
    """

    name = "W&B"

    def __init__(self, run_dir: Path, config: WandbConfig, mode: str, resolved: dict[str, Any]):
        self._folder = run_dir / "wandb"
        self._folder.mkdir(exist_ok=True)
        self._unfinished, self._sent_file = self._folder / "unfinished", self._folder / "sent-step"
        for name in ("id", "place"):  # W&B's tools take `wandb/run-*` for runs
            with contextlib.suppress(FileNotFoundError):  # only a run of an older version has the old name
                (self._folder / f"run-{name}").rename(self._folder / name)
        id_file = self._folder / "id"
        self._leave_the_original(id_file)
        self._set_aside()
        if not id_file.exists():
            replace_file(id_file, uuid.uuid4().hex[:8].encode())
        self._waiting: list[tuple[int, dict[str, float]]] = []
        self._facts: dict[str, float] = {}  # what the summary has of FACTS
        options = {
            "project": config.project or os.environ.get("WANDB_PROJECT") or "olmo-train",
            "entity": config.entity,  # None: the client reads the environment, as for group and tags
            "group": config.group,
            "name": config.name or os.environ.get("WANDB_NAME") or run_dir.resolve().name,
            "tags": list(config.tags) or None,
            "dir": str(run_dir),
            "id": id_file.read_text(encoding="utf-8"),
            "resume": "allow",
            "config": {**resolved, "code_version": code_version()},
        }
        self._run = self._begin(mode, options)
        replace_file(id_file, self._run.id.encode())  # in a sweep, the agent chooses the id
        self._live = not self._run.offline
        if self._live:  # the server knows the last step it has
            self.sent = self._run.starting_step - 1
        else:
            self.sent = int(self._sent_file.read_text(encoding="utf-8")) if self._sent_file.exists() else -1
            replace_file(self._unfinished, Path(self._run.dir).parent.name.encode())
        self._run.define_metric("throughput/total_tokens")  # offered as an x axis

    def _begin(self, mode: str, options: dict[str, Any]) -> Any:
        """The client's run. Falls back to offline if the server cannot be reached, which the client does not do itself."""
        if os.environ.get("WANDB_MODE", mode) not in MODES:
            os.environ["WANDB_MODE"] = mode  # the client fails on a spelling it does not know
        os.environ.setdefault("WANDB_SILENT", "true")  # for lines that the client prints before it has settings
        os.environ.setdefault("WANDB_DATA_DIR", str(self._folder.resolve()))  # keep all files under the run_dir
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # its telemetry logs every failure
        import wandb

        options["settings"] = wandb.Settings(init_timeout=PATIENCE, finish_timeout=PATIENCE, silent=True)
        if mode == "online":
            try:
                check_answers(server_url())
                return wandb.init(mode=mode, **options)
            except Exception as problem:
                log.warning(
                    "W&B cannot be reached, so this part of the run is recorded offline (wandb sync sends it later): %s",
                    " ".join(str(problem).split()),
                )
                wandb.teardown()  # or a failed attempt holds the run's id
        return wandb.init(mode="offline", **options)

    def _leave_the_original(self, id_file: Path) -> None:
        """In a copy of a run_dir, start a new run on W&B with the full history, as the id belongs to the original.

        A folder that was moved on one machine, or that another machine has under the same path, is not a copy.
        """
        place_file, here = self._folder / "place", {"host": socket.gethostname(), "path": str(self._folder.resolve())}
        if id_file.exists() and place_file.exists():
            was = json.loads(place_file.read_text(encoding="utf-8"))
            originals = [Path(was["path"], name) for name in (id_file.name, "run-id")]
            is_there = any(file.exists() and not file.samefile(id_file) for file in originals)
            if was["path"] != here["path"] and (was["host"] != here["host"] or is_there):
                log.warning("this run_dir is a copy of the one on %s at %s: W&B records it as a new run", *was.values())
                for record in self._folder.glob("offline-run-*"):  # so that `wandb sync` sends only the original's
                    record.rename(self._folder / f"copied-{record.name}")
                for file in (id_file, self._sent_file, self._unfinished):
                    file.unlink(missing_ok=True)
        replace_file(place_file, json.dumps(here).encode())

    def _set_aside(self) -> None:
        """Hide the offline record of a killed attempt from `wandb sync`: it is incomplete, and all its lines are sent again from
        metrics.jsonl."""
        if self._unfinished.exists():
            record = self._folder / self._unfinished.read_text(encoding="utf-8")
            if record.is_dir():
                record.rename(self._folder / f"killed-{record.name}")
            self._unfinished.unlink()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send a line of metrics; offline, it waits for its checkpoint."""
        if step > self.sent:
            self._waiting.append((step, metrics))
        if self._live:
            self.settle(step)

    def settle(self, step: int) -> None:
        """Send the lines up to this step."""
        while self._waiting and self._waiting[0][0] <= step:
            self.sent, metrics = self._waiting.pop(0)
            charts = {key: value for key, value in metrics.items() if key not in (*FACTS, "time")}  # W&B adds a time
            self._run.log(charts, step=self.sent, commit=True)
            facts = {key: metrics[key] for key in FACTS if key in metrics}
            if facts != self._facts:
                self._run.summary.update(facts)
                self._facts = facts

    def close(self) -> None:
        self._run.finish()
        replace_file(self._sent_file, str(self.sent).encode())
        self._unfinished.unlink(missing_ok=True)
