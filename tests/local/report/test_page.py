"""The page in a real browser: by keyboard, on a phone, in dark mode, and without the network.

python -m pytest -m slow tests/local/report/test_page.py
"""

import json
import shutil
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from local.evaluate import report
from local.recipes.recipe import read_excluded

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="apt-get install chromium chromium-driver"),
]


@pytest.fixture(scope="module")
def html(trained, drawn, tmp_path_factory) -> Path:
    run = shutil.copytree(trained, tmp_path_factory.mktemp("shown") / "tiny")
    return report(run, drawn.competition)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def shown(browser, html):
    browser.get(html.as_uri())
    WebDriverWait(browser, 60).until(rows)  # the script of the page makes them, which may take a moment
    return browser


def rows(browser, section: str = "classes") -> list[list[str]]:
    """The text of the cells of the table of classes, or of errors."""
    cells = "[...row.cells].map(cell => cell.innerText)"
    script = f"return [...document.querySelectorAll(arguments[0] + ' tbody tr')].map(row => {cells})"
    return browser.execute_script(script, f"#{section}")


def press(browser, *keys: str) -> None:
    webdriver.ActionChains(browser).send_keys(*keys).perform()


def test_the_page_loads_nothing_else_and_logs_no_error(browser, html):
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(html.as_uri())
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert html.as_uri() in urls
    assert [url for url in urls if url != html.as_uri() and not url.startswith("data:")] == []
    assert browser.get_log("browser") == []


def test_every_photo_is_loaded(shown):
    loaded = "return [...document.images].map(image => image.complete && image.naturalWidth > 0)"
    assert len(shown.execute_script(loaded)) > 20
    assert all(shown.execute_script(loaded))


def test_a_column_head_sorts_the_classes_in_both_directions(shown):
    heads = shown.find_elements(By.CSS_SELECTOR, "#classes thead button")
    column = [head.text for head in heads].index("shots")
    orders = []
    for _ in range(2):
        heads[column].click()
        orders.append([int(row[column]) for row in rows(shown)])
    assert orders[0] == sorted(orders[0], reverse=True)
    assert orders[1] == sorted(orders[0])
    assert orders[0] != orders[1]
    assert heads[column].find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"


def test_a_slash_searches_and_enter_opens_a_class(shown):
    everything = rows(shown)
    name = everything[-1][0].split(" ☠")[0]
    press(shown, "/", name)
    found = rows(shown)
    assert 0 < len(found) < len(everything)
    assert all(name in row[0] for row in found)
    shown.find_element(By.CSS_SELECTOR, "#classes tbody button").send_keys(Keys.ENTER)
    sheet = shown.find_element(By.CSS_SELECTOR, "dialog[open]")
    assert sheet.find_element(By.TAG_NAME, "h2").text == name
    assert sheet.find_element(By.TAG_NAME, "img").is_displayed()
    press(shown, Keys.ESCAPE)
    assert not shown.find_elements(By.CSS_SELECTOR, "dialog[open]")


def test_a_search_without_a_match_shows_no_row(shown):
    press(shown, "/", "no such species")
    assert rows(shown) == []
    assert shown.find_element(By.CSS_SELECTOR, "#classes [role=status]").text.startswith("0 of ")


def test_a_matrix_can_be_enlarged(shown):
    plot = shown.find_element(By.CLASS_NAME, "zoom")
    plot.send_keys(Keys.ENTER)
    large = shown.find_element(By.CSS_SELECTOR, "dialog[open] svg")
    assert large.size["width"] > 2 * plot.size["width"]


def test_errors_are_filtered_by_confusion_rank_shots_and_confidence(shown):
    everything = rows(shown, "errors")
    heads = [head.text.split(" ▼")[0] for head in shown.find_elements(By.CSS_SELECTOR, "#errors thead button")]
    filters = shown.find_elements(By.CSS_SELECTOR, "#errors .search label")
    assert [one.text.splitlines()[0] for one in filters[:4]] == [
        "confusion",
        "rank of the true class",
        "shots",
        "confidence",
    ]
    for head, one in (("rank", filters[1]), ("shots", filters[2])):
        select = Select(one.find_element(By.TAG_NAME, "select"))
        select.select_by_index(1)
        bounds = [int(word) for word in select.first_selected_option.text.split() if word.isdecimal()]
        found = [int(row[heads.index(head)]) for row in rows(shown, "errors")]
        assert found
        assert min(found) >= bounds[0]
        assert max(found) <= bounds[-1]
        assert len(found) <= len(everything)
        select.select_by_index(0)
    assert rows(shown, "errors") == everything
    Select(filters[0].find_element(By.TAG_NAME, "select")).select_by_index(1)
    true, guessed = heads.index("true class"), heads.index("predicted class")
    assert len({(row[true].splitlines()[0], row[guessed]) for row in rows(shown, "errors")}) == 1


def test_marks_are_saved_as_a_csv_that_training_excludes(shown, tmp_path):
    shown.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    marks = shown.find_elements(By.CSS_SELECTOR, "#errors tbody select")
    observations = [row[0].splitlines()[-1] for row in rows(shown, "errors")]
    for index, mark in ((0, "mislabelled"), (1, "duplicate"), (2, "duplicate"), (2, "–")):
        Select(marks[index]).select_by_visible_text(mark)
    shown.refresh()  # the marks are kept
    WebDriverWait(shown, 60).until(rows)
    button = shown.find_element(By.XPATH, "//button[starts-with(., 'Save 2 marks')]")
    shown.execute_script("arguments[0].click()", button)
    WebDriverWait(shown, 60).until(lambda _: (tmp_path / "marks.csv").is_file())
    assert set(read_excluded(tmp_path / "marks.csv")) == set(observations[:2])
    assert sorted(line.split(",")[1] for line in (tmp_path / "marks.csv").read_text().split()[1:]) == [
        "duplicate",
        "mislabelled",
    ]


def test_names_break_between_words_only(shown):
    names = "[...document.querySelectorAll('.open')].map(name => getComputedStyle(name))"
    assert set(shown.execute_script(f"return {names}.map(style => style.overflowWrap)")) == {"normal"}
    assert set(shown.execute_script(f"return {names}.map(style => style.hyphens)")) == {"manual"}


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_never_scrolls_sideways(shown, width):
    phone = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    shown.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        assert shown.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        shown.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_in_dark_mode_the_text_of_plots_is_light(shown):
    colour = "return getComputedStyle(document.querySelector(arguments[0])).fill.match(/\\d+/g).map(Number)"
    brightness = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        brightness[scheme] = sum(shown.execute_script(colour, ".plot svg text"))
    shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert brightness["light"] < 250 < 550 < brightness["dark"]
