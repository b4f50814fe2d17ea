"""What there is, in words: datasets, conditions, tables."""

from collections.abc import Iterator
from pathlib import Path

from experiments import datasets
from experiments.paper import conditions


def list_all(data_dir: Path | None) -> None:
  """Prints datasets, conditions and tables."""
  print('datasets')
  for name, spec in datasets.SPECS.items():
    status = datasets.status(name, data_dir)
    print(
      f'  {name:<12} {spec.classes:>4} classes  {spec.architecture:<8} '
      f'{status.state}: {status.text}'
    )
  print('\nconditions (any RULE[+BN][+BM[1-3]] works, such as frSF-10%+BN)')
  for condition in conditions.CONDITIONS.values():
    print(f'  {_condition_line(condition)}')
  print('\ntables')
  for table in conditions.TABLES.values():
    print(f'  {table.name:<5} {table.title}: {", ".join(table.columns)}')


def _condition_line(condition: conditions.Condition) -> str:
  plans = ' or '.join(
    ', then '.join(
      f'{size}' if epochs is None else f'{size} for {epochs} epochs'
      for epochs, size in plan
    )
    for plan in condition.batch_plans
  )
  norm = {'none': 'no BN', 'plain': 'BN', 'affine': 'BN, learnable'}
  update = condition.batch_manhattan
  text = (
    f'{condition.name:<18} {condition.rule:<10} '
    f'{f"BM setting {update}" if update else "SGD":<12} '
    f'{norm[condition.batch_norm]:<13} batch {plans}'
  )
  frozen = condition.frozen
  return text + ('' if frozen == 'nothing' else f', {frozen} frozen')


def check_lines(found: datasets.Report) -> Iterator[str]:
  """What ``data check`` found."""
  yield f'{found.name}: {found.source}'
  if found.note:
    yield f'note: {found.note}'
  yield f'digest: {found.digest}'
  sizes = ', '.join(f'{h}x{w}: {n}' for (h, w), n in found.sizes.items())
  yield f'stored sizes: {sizes or "vectors"}'
  yield f'test samples that are training samples too: {len(found.duplicates)}'
  yield from (f'  {test} = {train}' for test, train in found.duplicates)
  yield 'class: train, test'
  for name, count in found.train_counts.items():
    yield f'  {name}: {count}, {found.test_counts.get(name, 0)}'
  if found.grid is not None:
    yield f'pictures: {found.grid}'
