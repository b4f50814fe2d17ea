"""Claims: verdicts from runs, and from the paper's own numbers."""

import pytest

from experiments import report
from experiments.paper.conclusions import CONCLUSIONS, Conclusion
from experiments.report import frame, pages
from experiments.report.claims import FAILS, HOLDS, OPEN, judge
from tests.report.records import cell, like_the_paper

P = 'brSF+BN+BM {} brSF-25%+BN+BM 2 brSF-50%+BN+BM 30 brSF-75%+BN+BM 60 '
P += 'brSF-100%+BN+BM 80'
SIGNED = 'uSF+BN+BM 1 brSF+BN+BM {} frSF+BN+BM 1.5'
TOP = 'SGD_Top 9 RndF_Top {} RndF+BN+BM_Top 8 uSF+BN+BM_Top 10'

# key, errors by condition, effect, whether it holds; chance is 90
CASES = [
  ('magnitudes alike', SIGNED.format(2), 1, True),
  ('magnitudes alike', SIGNED.format(4), 3, False),
  ('magnitudes and SGD', SIGNED.format(2) + ' SGD 1', 1, True),
  ('magnitudes and SGD', SIGNED.format(2) + ' SGD 50', -48, True),
  ('magnitudes and SGD', SIGNED.format(5) + ' SGD 2', 3, False),
  ('BM and SGD', 'BM 5 SGD 2.5', 2.5, True),
  ('BM and SGD', 'BM 5.5 SGD 2.5', 3, False),
  ('uSF fails', 'uSF 80 SGD 2', 78, True),
  ('uSF fails', 'uSF 4 SGD 2', 2, False),
  ('uSF fails', 'uSF 88 SGD 87', 1, True),  # near chance
  ('uSF+BN works', 'uSF+BN 3 SGD 2', 1, True),
  ('uSF+BN works', 'uSF+BN 5 SGD 2', 3, False),
  ('uSF+BN works', 'uSF+BN 88 SGD 87', 1, False),
  ('brSF p', P.format(1), 1, True),
  ('brSF p', P.format(90), 0, False),
  ('RndF+BN learns', 'RndF+BN 40', 50, True),
  ('RndF+BN learns', 'RndF+BN 81', 9, False),
  ('RndF+BN is worse', 'RndF+BN 3 uSF+BN 2', 1, True),
  ('RndF+BN is worse', 'RndF+BN 2 uSF+BN 2', 0, False),
  ('uSF+BM works', 'uSF+BM 3 SGD 2', 1, True),
  ('uSF+BM works', 'uSF+BM 5 SGD 2', 3, False),
  ('RndF+BN gain', 'RndF 5 RndF+BN 3', 2, True),
  ('RndF+BN gain', 'RndF 3 RndF+BN 3', 0, False),
  ('RndF+BN+BM gain', 'RndF+BM 5 RndF+BN+BM 3', 2, True),
  ('Top alike', TOP.format(9.5), 2, True),
  ('Top alike', TOP.format(12), 4, False),
  ('BN+BM gain', 'BN 3 BN+BM 2', 1, True),
  ('uSF+BN+BM gain', 'uSF+BN 2 uSF+BN+BM 3', -1, False),
  ('RndF Bottom', 'RndF_Bottom 85', 5, True),
  ('RndF Bottom', 'RndF_Bottom 70', 20, False),
  ('uSF Bottom learns', 'uSF+BN+BM_Bottom 5', 85, True),
  ('uSF Bottom and free', 'uSF+BN+BM_Bottom 5 uSF+BN+BM 1', 4, False),
  ('BM settings', 'BM1 1 BM2 2 BM3 3.5', 2.5, True),
  ('uSF+BN+BM settings', 'uSF+BN+BM1 1 uSF+BN+BM2 2 uSF+BN+BM3 9', 8, False),
  ('BM batches', 'BM-5 9 BM-100 2', 7, True),
  ('SGD batches', 'SGD-5 9 SGD-100 2', 7, False),
]
ROWS = [row for row in CONCLUSIONS if isinstance(row, Conclusion)]


def claims(records):
  return {claim.row.key: claim for claim in judge(frame.read(records))}


def runs(errors, **changes):
  """Complete cells, from text such as 'BM 5 SGD 2.5'."""
  words = errors.split()
  return [
    run
    for name, error in zip(words[::2], words[1::2], strict=True)
    for run in cell(name.replace('_', ' '), float(error), **changes)
  ]


@pytest.fixture(name='judged', scope='module')
def _judged():
  """The cases, each as a dataset that is named after its errors."""
  return claims([run for _, errors, *_ in CASES
                 for run in runs(errors, dataset=errors)])  # fmt: skip


@pytest.mark.parametrize('key, errors, effect, holds', CASES)
def test_effect_and_verdict(judged, key, errors, effect, holds):
  found = {finding.label: finding for finding in judged[key].best.findings}
  assert found[errors].holds == holds
  assert found[errors].effect == pytest.approx(effect, abs=1e-6)


def test_every_conclusion_is_tried_above_or_across_datasets():
  untried = {row.key for row in ROWS} - {key for key, *_ in CASES}
  assert untried == {'uSF+BN+BM works', 'frSF p', 'RndF+BN+BM Bottom'}


def test_unless_each_of_its_conditions_is_complete_nothing_is_decided():
  records = []
  for row in ROWS:
    for short in ('nothing', *row.needs):
      for name in row.needs:
        made = cell(name, 5.0, dataset=f'{row.key}, short of {short}')
        records += made[1:] if name == short else made
  judged = claims(records)
  for row in ROWS:
    found = {finding.label for finding in judged[row.key].best.findings}
    assert f'{row.key}, short of nothing' in found
    assert not found & {f'{row.key}, short of {name}' for name in row.needs}


def test_a_claim_holds_on_more_than_half_of_the_datasets():
  good = runs('BM 2 SGD 2') + runs('BM 9 SGD 2', dataset='CIFAR')
  found = claims(good)['BM and SGD'].best
  assert (found.verdict, found.where) == (FAILS, '1 of 2 datasets')
  more = runs('BM 2 SGD 2', dataset='zoo')
  assert claims(good + more)['BM and SGD'].best.verdict == HOLDS


def test_copies_of_a_dataset_have_one_vote():
  copies = runs('BM 3 SGD 2', digest='aa') + runs('BM 4 SGD 2', digest='bb')
  found = claims(copies)['BM and SGD'].best
  assert found.summary('points') == 'holds (1 of 1 dataset), mean 1.50 points'
  bad = runs('BM 9 SGD 2', dataset='CIFAR')
  found = claims(copies + bad)['BM and SGD'].best
  assert (found.verdict, found.where) == (FAILS, '1 of 2 datasets')
  assert found.effect == pytest.approx((1.5 + 7) / 2)


def test_seeds_are_paired_and_give_an_interval():
  # The same difference in every seed: no uncertainty, though errors vary.
  records = [run for seed in range(3)
             for run in runs(f'BM {3 + 5 * seed} SGD {2 + 5 * seed}',
                             seed=seed)]  # fmt: skip
  (finding,) = claims(records)['BM and SGD'].best.findings
  assert finding.seeds == 3
  assert finding.interval == pytest.approx((1.0, 1.0))


def test_seeds_that_only_one_condition_has_are_left_out():
  records = runs('BM 5 SGD 4') + runs('SGD 80', seed=1)
  (finding,) = claims(records)['BM and SGD'].best.findings
  assert (finding.seeds, finding.effect, finding.interval) == (1, 1.0, None)
  assert finding.text('points') == 'holds, 1.00 points (1 of 2 seeds)'
  shown = report.claims_text(records)
  assert 'holds (MNIST), 1.00 points (1 of 2 seeds)' in shown


def test_held_out_errors_have_a_verdict_of_their_own():
  records = runs('BM 3', held_out=9.0) + runs('SGD 2')
  found = claims(records)['BM and SGD']
  assert (found.best.verdict, found.held_out.verdict) == (HOLDS, FAILS)


def test_the_papers_numbers_pass_most_of_its_claims():
  """Counted by hand from its tables: BM - SGD is 3.29 on CIFAR100 alone."""
  found = {key: c.paper for key, c in claims(cell('SGD', 1.0)).items()}
  (exception,) = (f for f in found['BM and SGD'].findings if not f.holds)
  assert exception.label == 'CIFAR100'
  assert exception.effect == pytest.approx(3.29)
  assert found['BM and SGD'].where == '14 of 15 datasets'
  assert found['BM batches'].where == '3 of 5 datasets'
  assert found['uSF fails'].where == '14 of 15 datasets'  # not TIMIT80
  assert found['BM settings'].verdict == FAILS


def test_the_paper_is_judged_on_the_datasets_at_hand_too():
  """BM - SGD is 0.32 on MNIST and 3.29 on CIFAR100."""
  both = runs('BM 30 SGD 30') + runs('BM 30 SGD 30', dataset='CIFAR100')
  found = claims(both)['BM and SGD'].paper_here
  assert (found.verdict, found.where) == (FAILS, '1 of 2 datasets')
  assert found.effect == pytest.approx((0.32 + 3.29) / 2)
  copies = [run for digest in ('d1', 'd2') for run in runs(
    'BM 30 SGD 30', dataset='CIFAR100', digest=digest
  )]  # fmt: skip
  found = claims(copies)['BM and SGD']
  labels = [finding.label for finding in found.best.findings]
  assert labels == ['CIFAR100 [d1]', 'CIFAR100 [d2]']
  assert found.paper_here.where == 'CIFAR100'
  others = claims(runs('BM 3 SGD 2', dataset='digits'))['BM and SGD']
  assert others.paper_here.where == '14 of 15 datasets'


def gains(*sizes):
  """BM helps Flowers17 most and MNIST least; the sizes are of training."""
  gained = {'MNIST': 49.9, 'Cal101': 45, 'Flowers17': 41}
  records = [
    run
    for (name, error), size in zip(gained.items(), sizes, strict=True)
    for run in runs(f'BN 50 BN+BM {error}', dataset=name, train_images=size)
  ]
  return claims(records)['BN+BM gain and size'], records


def test_the_gain_by_bm_is_compared_with_the_size_of_training_sets():
  found, records = gains(54000, 2754, 918)
  assert found.best.verdict == HOLDS
  assert found.best.effect == pytest.approx(-1.0)
  # The paper's gains are -0.21, 4.32 and 4.41.
  assert found.paper_here.where == 'over 3 datasets'
  assert found.paper_here.effect == pytest.approx(-1.0)
  assert found.paper.where == 'over 15 datasets'
  # The sizes are those that were trained on, not the paper's.
  assert gains(500, 600, 700)[0].best.verdict == FAILS
  assert gains(900, 900, 900)[0].best.verdict == OPEN
  assert not claims(runs('BN 50'))['BN+BM gain and size'].decided
  # A second copy is no second dataset.
  two = [r for r in records if r.config['dataset'] != 'Cal101']
  copy = runs('BN 50 BN+BM 49.9', digest='d2')
  assert not claims(two + copy)['BN+BM gain and size'].decided


def test_text_names_verdicts_and_what_is_missing():
  shown = report.claims_text(runs('SGD 2 BM 3'))
  assert 'best test error:      holds (MNIST), 1.00 points' in shown
  assert 'paper, same datasets: holds (MNIST), 0.32 points' in shown
  assert 'paper, all datasets:  holds (14 of 15 datasets)' in shown
  assert 'needs SGD, uSF' in shown


def test_claims_fit_the_terminal():
  results = frame.read(like_the_paper())
  judged = judge(results)
  for width in (60, 80, 120):
    lines = pages.text_claims(results, judged, width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) > 100
