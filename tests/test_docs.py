"""Documents cannot rot: examples run, and names, links and headings exist."""

import doctest
import re
from pathlib import Path

import pytest

import symjax_bp

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
GUIDE = (ROOT / 'symjax_bp' / 'README.md').read_text()


FOLDERS = (
  '.', 'symjax_bp', 'experiments', 'experiments/docs', 'experiments/tutorials',
)  # fmt: skip
DOCUMENTS = [path for each in FOLDERS for path in (ROOT / each).glob('*.md')]


@pytest.mark.parametrize('name', ['README.md', 'symjax_bp/README.md'])
def test_examples_print_what_they_say(name):
  result = doctest.testfile(
    str(ROOT / name),
    module_relative=False,
    optionflags=doctest.NORMALIZE_WHITESPACE,
  )
  assert result.attempted > 10 and result.failed == 0


def test_names_on_the_front_page_exist():
  for name in re.findall(r'symjax_bp\.([a-z_]+(?:\.\w+)?)\(', README + GUIDE):
    value = symjax_bp
    for part in name.split('.'):
      value = getattr(value, part)


def _anchors(text: str) -> set[str]:
  """The anchors of headings, as GitHub makes them."""
  return {
    re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
    for heading in re.findall(r'^#+ (.+)$', text, re.MULTILINE)
  }


@pytest.mark.parametrize('path', sorted(DOCUMENTS), ids=str)
def test_links_lead_somewhere(path):
  text = re.sub(r'```.*?```', '', path.read_text(), flags=re.DOTALL)
  for link in re.findall(r'\]\(([^)\s]+)\)', text):
    if link.startswith('https://'):
      continue
    name, _, anchor = link.partition('#')
    target = (path.parent / name).resolve() if name else path
    assert target.is_relative_to(ROOT.resolve()), link
    assert target.exists(), link
    if anchor:
      assert anchor in _anchors(target.read_text()), link


def test_the_two_commands_set_everything_up():
  commands = [
    line for line in README.splitlines() if line.startswith('python3 -m venv')
  ]
  assert len(commands) == 2
  first_screen = README.split('## Any JAX function')[0]
  assert all(command in first_screen for command in commands)
  ci = (ROOT / '.ci' / 'run').read_text()
  assert "command_of 'experiments demo'" in ci and 'command_of pytest' in ci


@pytest.mark.parametrize(
  ('name', 'place'),
  [
    ('uSF', 'symjax_bp.usf?'),
    ('BatchNorm', 'symjax_bp.linen.BatchNorm or symjax_bp.nnx.BatchNorm?'),
    ('layer_alignement', 'symjax_bp.metrics.layer_alignment or '),
    ('xyzzy', ''),
  ],
)
def test_a_wrong_name_gets_a_hint(name, place):
  with pytest.raises(AttributeError) as error:
    getattr(symjax_bp, name)
  hint = f'; did you mean {place}' if place else ''
  assert f"has no attribute '{name}'{hint}" in str(error.value)
  assert ('did you mean' in str(error.value)) == bool(place)
