"""Links between the documents lead to files and headings that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
  path
  for folder in (
    '.',
    'symjax_bp',
    'experiments',
    'experiments/docs',
    'experiments/tutorials',
  )
  for path in (ROOT / folder).glob('*.md')
)


def _anchors(text: str) -> set[str]:
  """The anchors of headings, as GitHub makes them."""
  return {
    re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
    for heading in re.findall(r'^#+ (.+)$', text, re.MULTILINE)
  }


@pytest.mark.parametrize('path', DOCUMENTS, ids=str)
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
