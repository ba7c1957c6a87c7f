"""Charts take most of a page's time: where a test does not look at them, they are empty, under their name."""

from html import escape

import pytest

from tfusion.reporting import plots


@pytest.fixture(autouse=True)
def empty_charts(request, monkeypatch):
    """Not for tests that ask for `charts`."""
    if "charts" not in request.fixturenames:
        monkeypatch.setattr(plots, "svg", lambda name, *args: f'<svg aria-label="{escape(name)}"></svg>')


@pytest.fixture
def charts():
    """Charts as matplotlib draws them."""
