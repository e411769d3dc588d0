"""Take a picture of a page with a headless chromium."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-quic"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", *QUIET.split()]


def browser() -> str | None:
    """Return the path of a chromium, or None."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


def run(page: Path, *flags: str) -> subprocess.CompletedProcess:
    """Open a page with further flags; raise `FileNotFoundError` where there is no browser."""
    path = browser()
    if path is None:
        raise FileNotFoundError("no chromium on the path: install one, with `apt-get install chromium` for example")
    with tempfile.TemporaryDirectory() as profile:
        command = [path, *FLAGS, f"--user-data-dir={profile}", *flags, page.resolve().as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def screenshot(page: Path, picture: Path, width: int = 1120, height: int = 1400, scale: float = 1.0) -> Path:
    """Write a picture of the top of a page, in CSS pixels times `scale`."""
    size = (f"--window-size={width},{height}", f"--force-device-scale-factor={scale}")
    run(page, *size, f"--screenshot={picture.resolve()}")
    return picture


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5]))
