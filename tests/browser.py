"""
A headless Chromium for the tests of the report, and its picture in the documentation.

    python tests/browser.py outputs/quickstart/report.html docs/images/report.png

Debian's packages `chromium` and `chromium-driver` bring the browser: `apt-get install chromium chromium-driver`.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "needs a browser and selenium: apt-get install chromium chromium-driver; pip install selenium"
FLAGS = [
    "--headless",
    "--no-sandbox",  # Chromium's sandbox does not start as root, as in continuous integration
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no name resolves: a page that needs the network fails
]


def is_available() -> bool:
    try:
        import selenium  # noqa: F401
    except ImportError:
        return False
    return BROWSER is not None and DRIVER is not None


@contextmanager
def browser(width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Any]:
    """Start a browser with a profile of its own, and end it."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in [*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        try:
            scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
            yield driver
        finally:
            driver.quit()


def open_report(driver: Any, path: Path, seconds: float = 120) -> None:
    """Open a report, and wait until it can be used."""
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get(path.resolve().as_uri())
    WebDriverWait(driver, seconds, poll_frequency=0.1).until(
        lambda driver: driver.execute_script("return document.documentElement.dataset.ready") == "true"
    )


def picture(report: Path, output: Path, width: int = 1100, height: int = 1500, dark: bool = False) -> None:
    """Write a picture of a report's beginning: findings, the first curves, and one group of completions."""
    with browser(width, height, dark) as driver:
        open_report(driver, report)
        driver.execute_script(
            "document.querySelectorAll('.chart').forEach((chart, i) => { if (i > 3) chart.remove(); });"
            "document.querySelectorAll('#charts > details').forEach((each) => each.remove());"
            "document.querySelectorAll('#charts > section').forEach((each, i) => { if (i > 0) each.remove(); });"
            "for (let group; (group = document.querySelector('.group')) && !group.querySelector('.negative');)"
            "  group.remove();"
        )
        driver.save_screenshot(str(output))


if __name__ == "__main__":
    picture(Path(sys.argv[1]), Path(sys.argv[2]), dark="--dark" in sys.argv)
