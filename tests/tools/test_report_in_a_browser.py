"""The report in a real browser: it draws at two widths, loads nothing, and its filters work."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from support.facts import tiny_facts

from hf_topk.inspection.page import write_page
from hf_topk.inspection.speed import Rate, Speed

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
NUM_EXPERTS = 6

pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs Chromium and its driver: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    facts = tiny_facts()
    rates = [Rate("dense", 10.0, 9.0, 11.0), Rate("sparse", 20.0, 19.0, 21.5)]
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(dataclasses.replace(facts, speed=Speed("a laptop, 4 threads", rates)), path)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def open_at(browser: webdriver.Chrome, page: Path, width: int, theme: str = "light") -> None:
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())


def shown(browser: webdriver.Chrome, selector: str) -> list[Any]:
    return [one for one in browser.find_elements(By.CSS_SELECTOR, selector) if one.is_displayed()]


def requests_of(browser: webdriver.Chrome) -> list[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_draws_and_loads_nothing(browser: webdriver.Chrome, page: Path, width: int, theme: str) -> None:
    open_at(browser, page, width, theme)
    for selector, least in (("svg.plot", 3), ("svg.plot circle", 6), ("svg.plot polyline", 3), (".bar", 2)):
        elements = browser.find_elements(By.CSS_SELECTOR, selector)
        assert len(elements) >= least
        assert all(one.size["width"] > 0 and one.size["height"] > 0 for one in elements)
    for plot in shown(browser, "svg.plot"):
        assert plot.size["width"] > 300
    circles = browser.find_elements(By.CSS_SELECTOR, "#map circle")
    assert len(circles) == NUM_EXPERTS
    frame = browser.find_element(By.ID, "map").rect
    for circle in circles:
        assert circle.size["width"] > 2
        assert frame["x"] <= circle.rect["x"] <= frame["x"] + frame["width"]
        assert frame["y"] <= circle.rect["y"] <= frame["y"] + frame["height"]
    assert shown(browser, "#map text")
    assert len(shown(browser, "#expert-table tbody tr")) == NUM_EXPERTS + 1  # and the always-on tokens
    # Nothing is wider than the page.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (theme == "light")
    assert browser.get_log("browser") == []
    assert set(requests_of(browser)) == {page.as_uri()}


def test_experts_are_found_by_their_tokens(browser: webdriver.Chrome, page: Path) -> None:
    open_at(browser, page, 1280)
    data = json.loads(browser.find_element(By.ID, "experts-data").get_attribute("textContent"))
    token = data["experts"][2][4][3]
    holders = [number for number, *_, tokens in data["experts"] if any(token in one for one in tokens)]
    field = browser.find_element(By.ID, "expert-filter")
    field.send_keys(token.upper())
    assert browser.find_element(By.ID, "expert-count").text == f"{len(holders)} of {NUM_EXPERTS} experts"
    rows = [row.text for row in shown(browser, "#expert-table tbody tr") if not row.text.startswith("always on")]
    assert [int(row.split()[0]) for row in rows] == holders
    assert len(shown(browser, "#map circle.hit")) == len(holders)
    assert token in [hit.text for hit in shown(browser, "#expert-table bdi.hit")]
    field.clear()
    field.send_keys("no such token")
    assert not shown(browser, "#expert-table tbody tr")
    assert browser.find_element(By.ID, "expert-count").text == f"0 of {NUM_EXPERTS} experts"
    for _ in "no such token":
        field.send_keys(Keys.BACKSPACE)
    assert len(shown(browser, "#expert-table tbody tr")) == NUM_EXPERTS + 1
    assert not shown(browser, "#map circle.hit")


def test_the_map_tells_of_an_expert(browser: webdriver.Chrome, page: Path) -> None:
    open_at(browser, page, 1280)
    data = json.loads(browser.find_element(By.ID, "experts-data").get_attribute("textContent"))
    assert not shown(browser, "#tip")
    svg = browser.find_element(By.CSS_SELECTOR, "#map svg")
    for keys, place in ((Keys.ARROW_RIGHT, 0), (Keys.ARROW_RIGHT, 1), (Keys.ARROW_LEFT, 0), (Keys.ARROW_LEFT, -1)):
        svg.send_keys(keys)
        number, _, _, picks, tokens = data["experts"][place]
        text = browser.find_element(By.ID, "tip").text
        assert f"Expert {number}" in text
        assert f"{100 * picks / data['positions']:.2f} %" in text
        assert tokens[0] in text
    svg.send_keys(Keys.ESCAPE)
    assert not shown(browser, "#tip")
    circle = browser.find_elements(By.CSS_SELECTOR, "#map circle")[0]
    webdriver.ActionChains(browser).move_to_element(circle).perform()
    assert f"Expert {data['experts'][0][0]}" in browser.find_element(By.ID, "tip").text
    assert len(shown(browser, "#map circle.current")) == 1


def test_misses_are_found_by_their_text(browser: webdriver.Chrome, page: Path) -> None:
    open_at(browser, page, 1280)
    everything = browser.find_elements(By.CSS_SELECTOR, ".misses li")
    texts = [one.get_attribute("textContent") for one in everything]
    assert len(shown(browser, ".misses li")) == 20 < len(everything)
    word = next(text for text in texts[20:])[-60:].split()[0]
    field = browser.find_element(By.ID, "miss-filter")
    field.send_keys(word)
    expected = sum(word.lower() in text.lower() for text in texts)
    assert len(shown(browser, ".misses li")) == min(20, expected)
    assert browser.find_element(By.ID, "miss-count").text == f"{expected} of {len(texts)}"
    field.clear()
    field.send_keys("zzz", *[Keys.BACKSPACE] * 3)
    browser.find_element(By.ID, "more-misses").click()
    assert len(shown(browser, ".misses li")) == len(everything)
