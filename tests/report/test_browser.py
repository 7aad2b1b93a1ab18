"""The pages in a real browser: they fit, in light and dark, fetch nothing and fail nowhere."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from browser import chromium, failures, is_light, seen_as
from s2ft.report.runs import runs_page


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium() as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_of_a_run_fits_and_is_light_or_dark(browser, finished, scheme, width) -> None:
    browser.get(Path(finished.output / "report.html").resolve().as_uri())
    with seen_as(browser, scheme, width):
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert is_light(browser) == (scheme == "light")
        pictures = browser.find_elements(By.CSS_SELECTOR, "svg, img.map")
        assert len(pictures) == 5
        assert all(one.size["width"] > 200 and one.size["height"] > 20 for one in pictures)
    browser.find_element(By.TAG_NAME, "summary").click()
    assert "fp32, as asked" in browser.find_element(By.TAG_NAME, "details").text
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []
    assert failures(browser) == []


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_of_several_runs_fits_and_names_them(browser, finished, tmp_path, width) -> None:
    cards = {"first": finished.card, "second": {**finished.card, "data": {"digest": "another"}}}
    (tmp_path / "runs.html").write_text(runs_page(cards), encoding="utf-8")
    browser.get((tmp_path / "runs.html").as_uri())
    with seen_as(browser, "dark", width):
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert not is_light(browser)
        assert len(browser.find_elements(By.CSS_SELECTOR, "svg")) == 5
        assert "second and first differ in their data" in browser.find_element(By.TAG_NAME, "main").text
        legend = browser.find_element(By.CLASS_NAME, "legend").text
        assert "first" in legend
        assert "second" in legend
    assert failures(browser) == []
