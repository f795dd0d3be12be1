"""The page in a browser: by keyboard alone, and under the rules of axe-core, on a phone, a laptop and a large screen."""

from __future__ import annotations

import itertools
from importlib.resources import files
from pathlib import Path

import pytest
from curves_runs import CHROMIUM, make_run
from runs import first_quick

from olmo_train.__main__ import main
from olmo_train.curves import exports, page, panels

if CHROMIUM is None:
    pytest.skip("no Chromium is installed; run make test-tools", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; run make test-tools")
pytest.importorskip("axe_playwright_python", reason="axe-core is not installed; run make test-tools")

AI2 = Path(__file__).parent / "references/olmo_ladder.csv"
SCREENS = {390: 844, 1400: 900, 2560: 1300}  # width: height
# What the keyboard must reach: controls, and tables that scroll.
CONTROLS = """[...document.querySelectorAll("select, input, button, summary, [tabindex='0']")]
  .filter((e) => e.checkVisibility({ visibilityProperty: true, contentVisibilityAuto: true }))"""
# Whether the focused element shows its focus, is on the screen, and is not covered.
FOCUS = """() => {
  const e = document.activeElement, box = e.getBoundingClientRect(), style = getComputedStyle(e);
  const x = Math.max(0, box.left) + 4, y = box.top + Math.min(box.height, innerHeight) / 2;
  const top = document.elementFromPoint(Math.min(x, innerWidth - 1), Math.min(Math.max(y, 0), innerHeight - 1));
  return { index: CONTROLS.indexOf(e), name: e.outerHTML.slice(0, 80), text: e.textContent.slice(0, 40),
           outlined: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
           seen: top === e || e.contains(top) || !!top?.closest("label")?.contains(e) };
}""".replace("CONTROLS", CONTROLS)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """{name: address} of pages of one run, of three runs, of two means over seeds, and of a fitted ladder."""
    folder = tmp_path_factory.mktemp("pages")
    one = make_run(folder / "one", steps=400, spikes=(205,), resume_at=120)
    seeds = [make_run(folder / f"lr{lr:g}-seed{s}", steps=100, seed=s, peak_lr=lr) for lr in (3e-4, 1e-3) for s in (1, 2)]
    found = {}
    for name, paths in {"one": [one], "three": [one, *seeds[1:3]], "seeds": seeds}.items():
        runs = exports.read_runs(paths)
        (folder / f"{name}.html").write_text(page.page_text(runs, panels.choose(runs), panels.View(panels.axis_of(runs, "step"))))
        found[name] = (folder / f"{name}.html").as_uri()
    words = ["--fit", AI2, "--column", "c4_loss_nats", "--forecast", "7e9,2e12", "--output", folder / "ladder.html"]
    assert main(["ladder", *map(str, words)]) == 0
    return found | {"ladder": (folder / "ladder.html").as_uri()}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser, pages):
    """A function that opens a page on a screen."""
    opened, errors = [], []

    def show(name: str, width: int = 1400, theme: str = "light"):
        tab = browser.new_page(viewport={"width": width, "height": SCREENS[width]}, color_scheme=theme)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.goto(pages[name], timeout=120_000)  # milliseconds; a busy machine is slow
        opened.append(tab)
        return tab

    yield show
    for tab in opened:
        tab.close()
    assert not errors


VIEWS = itertools.product(["one", "seeds", "ladder"], SCREENS, ["light", "dark"])
QUICK = (("one", 390, "dark"), ("seeds", 1400, "light"), ("ladder", 390, "light"))  # a phone and a laptop; the others are slow


@pytest.mark.parametrize("name, width, theme", first_quick(dict.fromkeys([*QUICK, *VIEWS]), len(QUICK)))
def test_axe_finds_nothing_serious_and_nothing_runs_over_the_edge(show, name, width, theme):
    tab = show(name, width, theme)
    tab.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    tab.evaluate((files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
    # A plot is one picture with a text; its thousand parts are none.
    found = tab.evaluate("axe.run({ exclude: ['.plot > *', 'figure > *'] })")
    severe = [(v["id"], v["nodes"][0]["html"]) for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert not severe and len(found["passes"]) > 20
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", SCREENS)
def test_tab_reaches_every_control_in_sight_and_with_its_focus_shown(show, width):
    tab = show("three", width)
    count = tab.evaluate(f"{CONTROLS}.length")
    reached = []
    for _ in range(count):
        tab.keyboard.press("Tab")
        focus = tab.evaluate(FOCUS)
        assert focus["outlined"] and focus["seen"], focus
        reached.append(focus["index"])
    assert sorted(reached) == list(range(count)) and count > 25


def focus(tab, selector: str) -> None:
    """Press Tab until the element has the focus."""
    for _ in range(120):
        tab.keyboard.press("Tab")
        if tab.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"Tab never reaches {selector}")


def test_every_kind_of_control_is_used_by_keyboard(show):
    tab = show("three")
    focus(tab, "#configuration summary")
    was_open = tab.evaluate("document.querySelector('#configuration details').open")
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.querySelector('#configuration details').open") != was_open
    focus(tab, "#runs th:nth-child(3) button")
    tab.keyboard.press("Enter")
    tab.keyboard.press("Enter")
    assert tab.locator("#runs th[aria-sort]").get_attribute("aria-sort") == "descending"
    assert tab.evaluate("document.activeElement.textContent") == "training loss"  # the focus stays after sorting
    focus(tab, "#runs tbody tr:first-child input")
    drawn = "data.panels[0].plot.data.length"
    before = tab.evaluate(drawn)
    tab.keyboard.press("Space")
    assert tab.evaluate(drawn) < before
    tab.keyboard.press("Space")
    assert tab.evaluate(drawn) == before
    focus(tab, "#axis")
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("data.panels[0].plot.layout.xaxis.title.text") == "tokens"
    focus(tab, "#range")
    tab.keyboard.press("End")
    assert tab.evaluate("state.range[0] / state.range[1]") == pytest.approx(0.9, abs=0.01)
    focus(tab, "#smoothing")
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#window").text_content() != "off"
    focus(tab, "#log-x")
    tab.keyboard.press("Space")
    assert tab.evaluate("data.panels[0].plot.layout.xaxis.type") == "log"
    focus(tab, "#metrics")
    tab.keyboard.type("norm")
    assert tab.locator(".panel:visible h3").all_text_contents() == ["Gradient norm"]
    tab.keyboard.press("Escape")  # empties the field
    focus(tab, "#events input")
    tab.keyboard.press("Space")
    assert not tab.evaluate("document.activeElement.checked")
    focus(tab, ".panel[aria-label='Gradient norm'] input")
    tab.keyboard.press("Space")
    assert tab.evaluate("data.panels.find((panel) => panel.title === 'Gradient norm').plot.layout.yaxis.type") == "linear"
