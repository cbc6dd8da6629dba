"""A real browser; a report in it, and the data that it carries."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait


@contextmanager
def chromium(profile: Path) -> Iterator[WebDriver]:
    """Headless Chromium with a profile of its own."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.fail("the browser's tests need Chromium and its driver; apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    flags += f"disable-component-update disable-sync window-size=1280,1000 user-data-dir={profile}"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


@contextmanager
def opened(report: Path, profile: Path) -> Iterator[WebDriver]:
    """Headless Chromium with the report open and its curves drawn."""
    with chromium(profile) as browser:
        browser.get(report.as_uri())
        WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#chart-reward .js-line"))
        yield browser


def data_of(html: str) -> dict:
    """What the report's script draws from."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])
