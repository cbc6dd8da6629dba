"""Prefect's UI in a real browser, by what a person sees there: names, labels, texts."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from selenium.common.exceptions import StaleElementReferenceException, TimeoutException, WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser import chromium
from tests.prefect_stack import WAIT_S

LAST_VERSION = "//main//a[contains(@href, '/artifacts/artifact/')]"
"""On the page of an artifact's key, which lists its versions, the newest first."""
LOGIN_S = 20.0
SHOWN = "//*[@role='tabpanel'][@data-state='active']"
"""The tab's content."""


class PrefectUI:
    """One window. Pages draw themselves as answers come in, so whatever is looked for is waited for."""

    def __init__(self, browser: WebDriver, server: Mapping[str, str]) -> None:
        self.browser, self._server = browser, server
        self._address = server["PREFECT_API_URL"].removesuffix("/api")

    def open(self, path: str) -> None:
        """A page of the UI that the server shows by default."""
        self.browser.get(f"{self._address}{path}")

    def see(self, xpath: str, within_s: float = WAIT_S) -> WebElement:
        """The first visible element that the path finds."""

        def visible(browser: WebDriver) -> WebElement | None:
            return next((found for found in browser.find_elements(By.XPATH, xpath) if found.is_displayed()), None)

        ignored = [StaleElementReferenceException]
        element = WebDriverWait(self.browser, within_s, ignored_exceptions=ignored).until(visible, f"{xpath}: not seen")
        assert element is not None
        return element

    def click(self, xpath: str) -> None:
        """Clicks it, when nothing lies over it any more."""

        def clicked(_: WebDriver) -> bool:
            self.see(xpath).click()
            return True

        WebDriverWait(self.browser, WAIT_S, ignored_exceptions=[WebDriverException]).until(clicked, f"click {xpath}")

    def log_in(self) -> None:
        """Gives the server's auth string where it is asked for. A page whose first question to a busy server was
        not answered in time shows its login no more, so it is opened again."""

        def asked(_: WebDriver) -> WebElement | None:
            self.open("/")
            return self.see("//input[@type='password']", LOGIN_S)

        waiting = WebDriverWait(self.browser, WAIT_S, ignored_exceptions=[TimeoutException])
        waiting.until(asked, "the login is not shown").send_keys(self._server["PREFECT_API_AUTH_STRING"], Keys.ENTER)
        self.see("//a[normalize-space()='Deployments']")

    def find_deployment(self, flow: str, name: str) -> None:
        """Opens a deployment's page by way of the list of all."""
        self.click("//a[normalize-space()='Deployments']")
        self.see("//input[@placeholder='Search deployments']").send_keys(flow)
        # The search opens the list anew, a moment later, whatever was clicked meanwhile.
        WebDriverWait(self.browser, WAIT_S).until(lambda b: f"={flow}" in b.current_url, f"search for {flow}")
        self.click(f"//tr[.//a[normalize-space()='{flow}']]//a[normalize-space()='{name}']")

    def open_artifact(self, key: str) -> WebElement:
        """The content of the newest artifact with this key."""
        self.open(f"/v2/artifacts/key/{key}")
        self.click(LAST_VERSION)
        self.see("//button[@role='tab'][normalize-space()='Artifact']")
        return self.see(SHOWN)

    def loaded_picture(self) -> tuple[str, int]:
        """Address and width in pixels of the picture that the page shows, when it has come."""
        script = "return [...document.querySelectorAll('main img')].filter(i => i.complete)[0]"
        picture = WebDriverWait(self.browser, WAIT_S).until(lambda b: b.execute_script(script), "no picture is shown")
        return picture.get_attribute("src"), int(picture.get_property("naturalWidth"))


@contextmanager
def prefect_ui(server: Mapping[str, str], folder: Path) -> Iterator[PrefectUI]:
    """The UI, logged in. If the block fails, `folder` holds a picture of what was seen last."""
    with chromium(folder / "profile") as browser:
        ui = PrefectUI(browser, server)
        try:
            ui.log_in()
            yield ui
        except BaseException as error:
            browser.save_screenshot(str(folder / "seen-last.png"))
            error.add_note(f"{browser.current_url}, see {folder / 'seen-last.png'}")
            raise


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Address of a plain web server over a folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            started.terminate()
