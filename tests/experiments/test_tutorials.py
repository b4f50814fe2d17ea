"""The tutorials run, on small settings; they assert what they claim."""

from pathlib import Path

import nbclient
import nbformat
import pytest
from jupyter_client.manager import KernelManager

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / 'experiments' / 'tutorials'
EPOCHS = {
  '1_alignment': 12,
  '2_rules': 10,
  '3_direct': 6,
  '4_manhattan': 10,
  '5_paper': 3,
  '6_robustness': 12,
}


@pytest.fixture(name='kernel', scope='module')
def _kernel():
  """One kernel for all tutorials, which share its imports and programs.

  It is another process: it imports this checkout, and shares the cache of
  compiled programs through the environment that conftest.py sets. A user has
  one CPU device.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('PYTHONPATH', str(ROOT))
    patch.setenv('XLA_FLAGS', '')
    manager = KernelManager()
    manager.start_kernel(cwd=str(TUTORIALS))
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize('name', sorted(EPOCHS))
def test_what_a_tutorial_claims_holds(name, kernel, tmp_path):
  notebook = nbformat.read(TUTORIALS / f'{name}.ipynb', as_version=4)
  (index,) = (
    i
    for i, cell in enumerate(notebook.cells)
    if 'parameters' in cell.metadata.get('tags', ())
  )
  settings = f'EPOCHS, RESULTS = {EPOCHS[name]}, {str(tmp_path)!r}'
  notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(settings))
  notebook.cells.insert(0, nbformat.v4.new_code_cell('%reset -f'))
  client = nbclient.NotebookClient(notebook, km=kernel, timeout=120)
  client.execute()
  client.kc.stop_channels()
  printed = [
    output.text
    for cell in notebook.cells
    for output in cell.get('outputs', ())
    if output.get('name') == 'stderr'
  ]
  assert not printed  # No warnings.


def test_tutorials_are_committed_as_executed():
  assert {path.stem for path in TUTORIALS.glob('*.ipynb')} == set(EPOCHS)
  for name in EPOCHS:
    notebook = nbformat.read(TUTORIALS / f'{name}.ipynb', as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1))
