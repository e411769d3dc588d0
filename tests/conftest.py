"""Strict settings for every test, and how long cases are shared out between the versions of Python."""

import collections
import sys

import jax
import pytest


@pytest.fixture(autouse=True)
def strict(request):
    """Refuse implicit rank promotion, so that no test passes by broadcasting."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave every other case of a `shared` test to the next version of Python; `-m "long or not long"` runs them all.

    Arithmetic is the same under every version, and the suite runs under two that follow each other.
    """
    seen = collections.Counter()
    for item in items:
        if hasattr(item, "callspec") and item.get_closest_marker("shared"):
            family = (item.path, item.originalname)
            if (seen[family] + sys.version_info.minor) % 2:
                item.add_marker(pytest.mark.long)
            seen[family] += 1
