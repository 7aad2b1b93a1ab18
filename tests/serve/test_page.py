"""The page at /, in a real browser: Debian's chromium, headless, through its own driver."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from browser import chromium, failures, is_light, seen_as
from live_server import KEY, Live, live
from s2ft import read_adapter

QUESTION = "reverse: planet"


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Live]:
    with live(root) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser: Chrome, server: Live) -> Chrome:
    browser.get(server.url)
    until(browser, lambda: "2 adapters" in text(browser, "status") and text(browser, "overlap"))
    return browser


def until(browser: Chrome, condition: Any) -> None:
    WebDriverWait(browser, 30, poll_frequency=0.05).until(lambda _: condition())


def text(browser: Chrome, name: str) -> str:
    return browser.find_element(By.ID, name).text


def say(browser: Chrome, words: str) -> dict[str, str]:
    """Who answers what, when all have answered."""
    browser.find_element(By.ID, "prompt").send_keys(words, Keys.ENTER)
    until(browser, lambda: "tokens a second over all" in text(browser, "status"))
    articles = browser.find_elements(By.TAG_NAME, "article")
    shown = {
        one.find_element(By.TAG_NAME, "h3").text: one.find_element(By.CSS_SELECTOR, "[aria-live]") for one in articles
    }
    return {name: answer.text for name, answer in shown.items()}


def wanted(server: Live, **how: Any) -> str:
    body = {"model": "base", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 128}
    answer: str = server.ask("POST", "/v1/chat/completions", {**body, **how})[1]["choices"][0]["message"]["content"]
    return answer


def test_the_base_and_the_adapters_answer_side_by_side(page: Chrome, server: Live) -> None:
    found = say(page, QUESTION)
    assert found == {name: wanted(server, model=name).strip() for name in ("base", "user0", "user1")}
    rows = re.search(r"([\d.]+) rows in the batch on average", text(page, "status"))
    assert rows is not None
    assert 1 <= float(rows[1]) <= 3
    assert "tokens" in page.find_element(By.CLASS_NAME, "numbers").text
    assert len(page.find_elements(By.CLASS_NAME, "differs")) == len(
        [one for one in found.values() if one != found["base"]]
    )


def test_it_goes_on_with_a_chat_and_begins_a_new_one(page: Chrome) -> None:
    say(page, QUESTION)
    page.find_element(By.ID, "prompt").clear()
    page.execute_script("document.getElementById('status').textContent = ''")  # so that the next end is seen
    say(page, "sort: queue")
    assert [one.text for one in page.find_elements(By.CSS_SELECTOR, "article:first-of-type .asked")] == [
        QUESTION,
        "sort: queue",
    ]
    page.find_element(By.ID, "anew").click()
    assert page.find_elements(By.TAG_NAME, "article") == []


def test_sliders_weigh_a_fusion(page: Chrome, server: Live) -> None:
    first = page.find_element(By.CSS_SELECTOR, "#weights input[name=user0]")
    first.send_keys(*[Keys.ARROW_RIGHT] * 5)
    second = page.find_element(By.CSS_SELECTOR, "#weights input[name=user1]")
    second.send_keys(*[Keys.ARROW_LEFT] * 15)
    assert [one.text for one in page.find_elements(By.CSS_SELECTOR, "#weights output")] == ["0.75", "-0.25"]
    assert page.find_element(By.ID, "fuse").is_selected()
    found = say(page, QUESTION)
    assert found["0.75 × user0 + -0.25 × user1"] == wanted(server, fuse={"user0": 0.75, "user1": -0.25}).strip()
    assert len(found) == 4


def test_the_picture_counts_what_the_adapters_train(page: Chrome, root: Path) -> None:
    ours, theirs = (read_adapter(root / name).slices for name in ("user0", "user1"))
    shared = sum(len({*ours[module].indices} & {*theirs[module].indices}) for module in ours)
    counts = [sum(len(one.indices) for one in slices.values()) for slices in (ours, theirs)]
    said = f"user0 trains {counts[0]} channels, user1 {counts[1]}; {shared} are shared."
    assert text(page, "overlap") == said
    painted = "return new Set(document.getElementById('map').getContext('2d').getImageData(0, 0, 900, 100).data).size"
    assert page.execute_script(painted) > 10
    page.find_element(By.ID, "second").send_keys("nothing")
    until(page, lambda: text(page, "overlap") == f"user0 trains {counts[0]} channels in {len(ours)} modules.")


def test_everything_can_be_reached_by_keyboard(page: Chrome) -> None:
    reached = []
    page.find_element(By.TAG_NAME, "body").click()
    for _ in range(20):
        page.switch_to.active_element.send_keys(Keys.TAB)
        here = page.switch_to.active_element
        reached.append(here.get_attribute("id") or here.get_attribute("value") or here.get_attribute("name"))
    assert {"base", "user0", "user1", "fuse", "temperature", "limit", "prompt", "send", "anew", "first", "second"} <= {
        *reached
    }
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert page.execute_script(outline) == "solid"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_a_phone_and_is_light_or_dark(page: Chrome, scheme: str, width: int) -> None:
    with seen_as(page, scheme, width):
        say(page, QUESTION)
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert is_light(page) == (scheme == "light")


def test_nothing_is_fetched_from_elsewhere_and_nothing_fails(page: Chrome, server: Live) -> None:
    say(page, QUESTION)
    fetched = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert fetched
    assert all(name.startswith(f"{server.url}/") for name in fetched if not name.startswith("data:"))
    assert failures(page) == []


def test_it_asks_for_a_key_where_one_is_needed(browser: Chrome, root: Path) -> None:
    with live(root, keys=(KEY,)) as server:
        browser.get(server.url)
        until(browser, lambda: "a key is needed" in text(browser, "status"))
        field = browser.find_element(By.ID, "key")
        assert field.is_displayed()
        field.send_keys(KEY, Keys.TAB)
        until(browser, lambda: "2 adapters" in text(browser, "status"))
        assert set(say(browser, QUESTION)) == {"base", "user0", "user1"}
        browser.get("about:blank")
