"""Strict settings for every test, and how long cases are shared out between the versions of Python."""

import sys
import zlib

import jax
import pytest


@pytest.fixture(autouse=True)
def strict(request):
    """Refuse implicit rank promotion, so that no test passes by broadcasting."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leave half of the cases of `shared` tests, by their names, to the next version of Python.

    The suite runs under two that follow each other. `-m "long or not long"` runs all, as does naming a test.
    """
    if any("::" in argument for argument in config.args):
        return
    for item in items:
        half = (zlib.crc32(item.nodeid.encode()) + sys.version_info.minor) % 2
        if half and hasattr(item, "callspec") and item.get_closest_marker("shared"):
            item.add_marker(pytest.mark.long)
