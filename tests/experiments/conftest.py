"""A cache folder that stands for the user's, apart from the real one."""

import pytest


@pytest.fixture(autouse=True)
def _cache_home(monkeypatch, tmp_path_factory):
  path = tmp_path_factory.getbasetemp() / 'cache_home'
  monkeypatch.setenv('XDG_CACHE_HOME', str(path))
