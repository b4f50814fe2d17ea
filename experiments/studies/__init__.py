"""Studies: finished runs, one JSONL file per study in ``experiments/results``.

``studies.toml`` says what each study is, why it was made, with which commands,
and what came out.
"""

from experiments.studies.files import fold, load

__all__ = ['fold', 'load']
