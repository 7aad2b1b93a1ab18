"""A real browser for tests of pages: Debian's chromium, headless, through its own driver; tests are skipped without it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

if not shutil.which("chromium") or not shutil.which("chromedriver"):
    pytest.skip("needs chromium and chromium-driver", allow_module_level=True)

_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,1000")


@contextmanager
def chromium() -> Iterator[Chrome]:
    """One that is closed afterwards."""
    options = ChromeOptions()
    for flag in _FLAGS:
        options.add_argument(flag)
    options.binary_location = str(shutil.which("chromium"))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = Chrome(options, Service(str(shutil.which("chromedriver"))))
    yield found
    found.quit()


@contextmanager
def seen_as(browser: Chrome, scheme: str, width: int) -> Iterator[None]:
    """With a light or dark scheme and a width in pixels, below 500 as on a phone."""
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    size = {"width": width, "height": 800, "deviceScaleFactor": 2, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def is_light(browser: Chrome) -> bool:
    """Whether the page's background is."""
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    return sum(map(int, colour.strip("rgb()").split(","))) > 3 * 128


def failures(browser: Chrome) -> list[str]:
    """What the browser's console complains of."""
    return [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]
