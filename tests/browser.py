"""A real browser, where there is one: headless Chromium through its driver, without any network of its own."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


@contextmanager
def browser(profile: Path) -> Iterator[Chrome]:
    """Chromium with an empty profile; the test skips where Debian's chromium and chromium-driver are not installed."""
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no browser here: install chromium and chromedriver (Debian: chromium chromium-driver)")
    options = ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options, Service(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


def resize(chrome: Chrome, width: int, height: int) -> None:
    """The page's own size, as a device of that size would show it."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def shot(chrome: Chrome, path: Path) -> None:
    """The whole page as PNG, below the fold too."""
    height = chrome.execute_script("return document.documentElement.scrollHeight")
    resize(chrome, chrome.execute_script("return window.innerWidth"), height)
    assert chrome.save_screenshot(str(path))
