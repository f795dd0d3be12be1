"""The page: its data are the logged values, it asks no network for anything, and a browser draws it."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from curves_runs import CHROMIUM, make_run
from runs import lines_of

from olmo_train.curves import exports, page, panels, thin
from olmo_train.curves.runs import Run, Series
from olmo_train.curves.serve import serve
from olmo_train.errors import ConfigError


def write_page(paths: list[Path], output: Path) -> str:
    runs = exports.read_runs(paths)
    output.write_text(page.page_text(runs, panels.choose(runs), panels.View(panels.axis_of(runs, "step"))))
    return output.read_text()


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1))


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    return [
        make_run(tmp_path / "a", steps=400, spikes=(205,), resume_at=120),
        make_run(tmp_path / "b", steps=300, seed=1, peak_lr=6e-4, width=384),
    ]


def test_the_values_in_the_page_are_those_of_metrics_jsonl(runs, tmp_path):
    data = data_of(write_page(runs, tmp_path / "page.html"))
    drawn = set()
    for panel in data["panels"]:
        for curve in panel["curves"]:
            lines = lines_of(runs[curve["run"]])
            logged = [(line["step"], line[curve["metric"]]) for line in lines if curve["metric"] in line]
            assert list(zip(curve["step"], curve["value"], strict=True)) == logged
            drawn.add(curve["metric"])
    assert {"train/CrossEntropyLoss", "eval/web/CrossEntropyLoss", "train/source/code/CrossEntropyLoss"} <= drawn
    assert {"optim/total_grad_norm", "optim/learning_rate_group0", "throughput/mfu"} <= drawn


def test_the_page_marks_events_the_clip_line_and_differences_of_configuration(runs, tmp_path):
    data = data_of(write_page(runs, tmp_path / "page.html"))
    events = data["runs"][0]["events"]
    assert [e["step"] for e in events["resume"]] == [120] and [e["step"] for e in events["skip"]] == [235]
    assert [e["step"] for e in events["spike"]] == [200, 210] and len(events["save"]) == 20
    norm = next(panel for panel in data["panels"] if panel["title"] == "Gradient norm")
    assert [limit["value"] for limit in norm["limits"]] == [1.0, 1.0]
    different = {row[0]: row[1:] for row in data["differences"]["rows"]}
    assert different["optim.peak_lr"] == ["0.0003", "0.0006"] and different["model.d_model"] == ["256", "384"]
    assert "run_dir" not in different and "model.n_layers" not in different


def test_the_page_names_no_address_that_it_would_load(runs, tmp_path):
    text = write_page(runs, tmp_path / "page.html")
    assert not re.search(r"(?:src|href)=[\"']\s*https?://", text)
    outside = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert "http://" not in outside and "https://" not in outside
    assert not re.search(r"<(script|img|link|iframe)[^>]*(src|href)=", outside)
    assert "default-src 'none'" in text


def test_a_run_of_a_million_steps_makes_a_bounded_page_that_keeps_its_spikes():
    steps = np.arange(1, 1_000_001)
    values = np.random.default_rng(0).normal(3, 0.02, len(steps))
    values[640_001] = 9.75
    loss = Series(steps, values)
    events = [{"event": "skip", "step": int(step)} for step in steps[::1000]]
    run = Run("long", Path("long"), {"train/CrossEntropyLoss": loss}, events=events)
    data = page.page_data([run], panels.choose([run]), panels.View(panels.axis_of([run], "step")))
    curve = data["panels"][0]["curves"][0]
    assert len(curve["step"]) <= page.MAX_POINTS and len(curve["mean"]["step"]) <= page.MAX_POINTS // 4
    assert curve["value"][curve["step"].index(640_002)] == 9.75
    assert len(data["runs"][0]["events"]["skip"]) <= page.MAX_EVENTS
    assert data["runs"][0]["summary"]["events"]["skip"] == len(events)


def test_what_is_not_finite_is_a_gap_in_valid_json(tmp_path):
    lines = ['{"step": 1, "train/CrossEntropyLoss": 2.0}', '{"step": 2, "train/CrossEntropyLoss": NaN}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "train/CrossEntropyLoss": Infinity}\n']))
    curve = data_of(write_page([tmp_path], tmp_path / "page.html"))["panels"][0]["curves"][0]
    assert curve["value"] == [2.0, None, None] and curve["odd"] == {"2": "nan", "3": "inf"}


def test_names_from_a_run_cannot_become_markup(tmp_path):
    row = {"_step": 1, "</script><img src=x>": 1.0}
    (tmp_path / "<b>.jsonl").write_text(json.dumps(row) + "\n")
    text = write_page([tmp_path / "<b>.jsonl"], tmp_path / "page.html")
    assert "</script><img" not in text and "<title>&lt;b&gt;</title>" in text
    assert data_of(text)["panels"][0]["title"] == "</script><img src=x>"


def test_a_served_page_has_what_the_run_has_logged_by_now(runs, tmp_path):
    def choose():
        found = exports.read_runs(runs)
        return found, panels.choose(found), panels.View(panels.axis_of(found, "step"))

    addresses: queue.Queue[str] = queue.Queue()
    threading.Thread(target=serve, args=(choose, 0, addresses.put), daemon=True).start()
    address = addresses.get(timeout=30)
    with urllib.request.urlopen(address) as answer:
        text = answer.read().decode()
    assert "connect-src 'self'" in text and data_of(text)["runs"][1]["summary"]["steps"] == 300
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 310, "train/CrossEntropyLoss": 3.0}) + "\n")
    with urllib.request.urlopen(f"{address}/data") as answer:
        assert json.loads(answer.read())["runs"][1]["summary"]["steps"] == 310
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{address}/etc/passwd")
    with pytest.raises(ConfigError, match="cannot be used"):
        serve(choose, int(address.rpartition(":")[2]), print)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed; run make test-tools")
def test_a_browser_draws_the_logged_values_and_links_the_zoom_of_all_panels(runs, tmp_path):
    text = write_page(runs, tmp_path / "page.html")
    probe = """<script>
      const told = data.panels.map((panel) => panel.plot.data.slice(0, panel.curves.length).map((trace) => trace.y));
      const curve = data.panels[0].curves[0];
      const smoothed = smooth(curve.step, curve.value, 50);
      Plotly.relayout(data.panels[1].plot, {"xaxis.range[0]": 100, "xaxis.range[1]": 200}).then(() => {
        const zoomed = data.panels.map((panel) => panel.plot.layout.xaxis.range);
        document.body.replaceChildren(JSON.stringify({ told, zoomed, smoothed }));
      });
    </script></body>"""
    (tmp_path / "probe.html").write_text(text.replace("</body>", probe))
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--virtual-time-budget=5000"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "probe.html").as_uri()]
    dom = subprocess.run(words, capture_output=True, text=True, timeout=120).stdout
    seen = json.loads(re.search(r"<body>(.*)</body>", dom, re.S).group(1))
    panels_told = data_of(text)["panels"]
    assert seen["told"] == [[curve["value"] for curve in panel["curves"]] for panel in panels_told]
    loss = exports.read_runs(runs)[0].series["train/CrossEntropyLoss"]
    np.testing.assert_allclose(seen["smoothed"], thin.smooth(loss, 50).values, rtol=1e-12)
    assert seen["zoomed"] == [[100, 200]] * len(panels_told)
