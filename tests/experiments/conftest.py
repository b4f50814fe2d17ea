"""A cache folder that stands for the user's, apart from the real one."""

import pytest


@pytest.fixture(autouse=True, scope='module')
def _cache_home(tmp_path_factory):
  path = tmp_path_factory.getbasetemp() / 'cache_home'
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XDG_CACHE_HOME', str(path))
    yield
