import pytest

from tests.launch.stubs import Engines


@pytest.fixture
def engines(tmp_path):
    return Engines(tmp_path)
