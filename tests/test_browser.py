"""The dashboard in a real browser, headless, while a search writes to the same database."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nas.config import LatencyConfig, SearchConfig
from nas.display import showcase
from nas.lab.invented import FakeEvaluator
from nas.recorded import RecordedStudy
from nas.search import loop as search
from studies.display import artifact_folder
from tests.nas.test_search import opened

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ROOT = Path(__file__).parents[1]
# No connection of its own to the outside, and no sandbox, which root cannot have.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1400,1600",
)  # fmt: skip
# Of a page to show what is waited for; the machine is shared.
PATIENCE_S = 60
# A search that lasts until it is ended.
SEARCHING = """
import sys
from nas.search import loop as search
from nas.config import LatencyConfig, SearchConfig
from nas.lab.invented import FakeEvaluator
print("begun", flush=True)
latency = LatencyConfig(device="cpu")
search.run(SearchConfig(budget=5000, storage=sys.argv[1], study="live", latency=latency), FakeEvaluator())
"""

pytestmark = pytest.mark.browser


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed: the dashboard was not tested in a browser")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    made.set_page_load_timeout(PATIENCE_S)
    yield made
    made.quit()


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])}


@pytest.fixture
def url(sqlite_url: str, environment: dict[str, str]) -> Iterator[str]:
    """The address of `run_search.py dashboard` on a finished study, and one that is being searched."""
    finished = SearchConfig(budget=12, storage=sqlite_url, study="finished", latency=LatencyConfig(device="cpu"))
    search.run(finished, FakeEvaluator())
    store = opened(finished)
    showcase.show(RecordedStudy.open(store, "finished"), artifact_folder(sqlite_url))
    store.close()
    live = subprocess.Popen(
        [sys.executable, "-c", SEARCHING, sqlite_url], stdout=subprocess.PIPE, text=True, env=environment
    )
    dashboard = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "run_search.py"), "dashboard", "--storage", sqlite_url],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert live.stdout is not None
        assert live.stdout.readline() == "begun\n"
        assert dashboard.stdout is not None
        line = next(line for line in dashboard.stdout if "http://" in line)
        yield line.split()[1]
        assert live.poll() is None, "the search that was looked at has ended"
        dashboard.terminate()
        assert dashboard.wait(timeout=PATIENCE_S) == 0
    finally:
        for process in (live, dashboard):
            process.kill()
            process.communicate()


def wait_for(browser: Chrome, *words: str) -> str:
    """The page's text once it holds all of these."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def text(at: Chrome) -> str:
        return at.find_element(By.TAG_NAME, "body").text

    WebDriverWait(browser, PATIENCE_S).until(lambda at: all(word in text(at) for word in words), f"no {words}")
    return text(browser)


def complaints(browser: Chrome) -> list[str]:
    """What the page's scripts have found wrong."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_study_is_looked_at_while_another_is_searched(browser: Chrome, url: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(url)
    wait_for(browser, "finished", "live")
    browser.find_element(By.CSS_SELECTOR, "a[href$='/studies/1']").click()
    wait_for(browser, "Pareto Front", "Objective X", "accuracy", "latency_ms", "Timeline")
    # The plot is drawn, with a mark a complete trial at least.
    marks = browser.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .scatterlayer path.point")
    assert len(marks) >= 12

    browser.get(f"{url}dashboard/studies/1/trials?numbers=1")
    told = wait_for(browser, "Trial 1", "Note", "group width", "Artifacts", "t0001_config.json")
    for words in ("complete", "expansion", "stage1_width", "computational_efficiency", "uir_r2_a5_k0"):
        assert words in told, words
    pictures = browser.find_elements(By.CSS_SELECTOR, "img[src*='/artifacts/']")
    assert len(pictures) == 2
    for picture in pictures:
        assert browser.execute_script("return arguments[0].naturalWidth", picture) > 300  # type: ignore[no-untyped-call]

    browser.get(f"{url}dashboard/studies/1/note")
    wait_for(browser, "Search for ConvFirst networks", "AdamW", "anchor")

    browser.get(f"{url}dashboard/studies/2/trials?numbers=0")
    wait_for(browser, "Trial 0", "group width")
    assert complaints(browser) == []

    # The one that is being searched has more trials the second time.
    def trials() -> int:
        browser.get(f"{url}api/studies/2")
        return len(json.loads(browser.find_element(By.TAG_NAME, "pre").text)["trials"])

    first = trials()
    WebDriverWait(browser, PATIENCE_S).until(lambda _: trials() > first)
