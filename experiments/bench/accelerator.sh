#!/usr/bin/env bash
# What to do first on a machine with an NVIDIA GPU, in stages of a few minutes.
#
#   accelerator.sh prepare            with network: fills .wheels/
#   accelerator.sh [--dry] STAGE...   tests, steps, large, grid; no network
#
# Read from the environment:
#   OUT      folder for what the stages write, 11 files (build/accelerator)
#   DATA     folder with mnist.npz, and with what earlier calls wrote to OUT:
#            the stages go on from that
#   RESULTS  folder of the grid while it is trained (results/accelerator)
#   PYTHON   with JAX for CUDA, Flax, Optax, chex, Orbax and PyTorch (python3)
#
# --dry does the same on tiny sizes on a CPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
script=experiments/bench/accelerator.sh
out=${OUT:-build/accelerator} data=${DATA:-} python=${PYTHON:-python3}
wheels=.wheels study=mnist-65-epochs
results=${RESULTS:-results/accelerator} # stays on the machine between calls

# What a stage needs beside the above and what they depend on.
packages=(
  tyro docstring-parser typeguard typing-extensions
  rich pygments markdown-it-py mdurl filelock jinja2 markupsafe
  pandas python-dateutil six
  matplotlib contourpy cycler fonttools kiwisolver packaging pillow pyparsing
  pytest iniconfig pluggy pytest-xdist execnet
  equinox jaxtyping wadler-lindig
)

prepare() {
  mkdir -p "$wheels"
  local platform platforms=()
  for platform in manylinux_2_{28,27,26,24,17}_x86_64 manylinux2014_x86_64; do
    platforms+=(--platform "$platform")
  done
  "$python" -m pip download --quiet --no-deps --only-binary=:all: \
    --implementation cp --python-version 3.12 "${platforms[@]}" \
    --dest "$wheels" "${packages[@]}"
  # Pure Python, published as source only.
  "$python" -m pip wheel --quiet --no-deps --wheel-dir "$wheels" \
    'biotorch>=0.0.16'
  du -sh "$wheels"
}

# Puts the wheels of packages that the machine lacks on Python's path.
install() {
  [ -d "$wheels" ] || return 0
  local missing site
  site=$(mktemp -d)
  missing=$("$python" - "$wheels"/*.whl <<'PYTHON'
import importlib.metadata
import sys

for path in sys.argv[1:]:
  name = path.rpartition('/')[2].partition('-')[0]
  try:
    importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    print(path)
PYTHON
  )
  [ -n "$missing" ] || return 0
  # shellcheck disable=SC2086
  "$python" -m pip install --quiet --no-index --no-deps --no-compile \
    --target "$site" $missing
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
}

# Runs a command for so many seconds; what it wrote by then counts.
within() {
  local status=0
  timeout --kill-after=15 "$@" || status=$?
  case $status in
    124 | 137) echo "stopped after $1 s: call the stage again" ;;
    *) return "$status" ;;
  esac
}

# Copies what an earlier call wrote, unless this machine has it.
fetch() {
  if [ -n "$data" ] && [ -e "$data/$1" ] && [ ! -e "$out/$1" ]; then
    mkdir -p "$(dirname "$out/$1")"
    cp "$data/$1" "$out/$1"
  fi
}

tests() {
  local files options=(-p xdist -n 12)
  mapfile -t files < <(grep -l 'mark.accelerator' tests/test_*.py)
  [ -z "$dry" ] || options=(--collect-only)
  # cuDNN's fastest sums come in any order, and TF32 has 10 bits. Warnings are
  # errors, so no plugin that happens to be there may take part.
  XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_deterministic_ops=true" \
    JAX_DEFAULT_MATMUL_PRECISION=float32 \
    XLA_PYTHON_CLIENT_PREALLOCATE=false PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 \
    within 90 "$python" -m pytest -v -m accelerator -p no:cacheprovider \
    "${options[@]}" "${files[@]}" | tee "$out/tests.txt"
}

steps() {
  local options=(
    --batch 100 1000 --precision float32 tensorfloat32 bfloat16
    --rule BP uSF brSF RndF --repeat 20 --steps 5 --seconds 1
  )
  [ -z "$dry" ] || options=(
    --architecture timit --batch-norm plain --batch 4 --rule frSF
    --steps 1 --seconds 0
  )
  fetch bench.json
  # The rest of the memory is PyTorch's.
  XLA_PYTHON_CLIENT_MEM_FRACTION=.5 within 240 "$python" -m \
    experiments.bench steps "${options[@]}" --resume --limit 110 --out "$out"
}

# Pictures of 224 x 224. No direct feedback: its B for the first layer of
# ResNet-18 alone has 800,000 x 1,000 numbers.
large() {
  local options=(
    --architecture resnet18 vit --batch 64 --precision float32 tensorfloat32
    --rule BP uSF NuSF brSF frSF RndF FrozenSign TiedNorm KP PFA LowRank16
    --batch-norm plain --repeat 5 --steps 5 --seconds 1
  )
  [ -z "$dry" ] || options=(
    --architecture vit --batch-norm plain --batch 2 --rule uSF --steps 1
    --seconds 0
  )
  fetch large/bench.json
  within 240 "$python" -m experiments.bench steps "${options[@]}" --resume \
    --limit 110 --out "$out/large"
}

grid() {
  local conditions finished status=0
  local options=(--dataset mnist --data-dir "${data:-data}")
  conditions=$("$python" - <<'PYTHON'
from experiments.paper.conditions import TABLES, find

# Table 2 first; a condition that has several names once.
names = {}
for table in ('2', '4-C1', '4-C2', '3', '5', '6'):
  for name in (TABLES[table].baseline, *TABLES[table].columns):
    names.setdefault(find(name).conditions, name)
print(*names.values(), sep='\n')
PYTHON
  )
  if [ -n "$dry" ]; then
    options=(
      --dataset digits --epochs 2 --train-size 200
      --plugin tests/experiments/small_network.py --network small
    )
    conditions=$(head -1 <<<"$conditions")
  fi
  fetch grid.tar.gz
  if [ -e "$out/grid.tar.gz" ] && [ ! -e "$results" ]; then
    mkdir -p "$results"
    tar -xzf "$out/grid.tar.gz" -C "$results"
  fi
  # A process for each condition: while one compiles, others train. The rates
  # of a condition are one program.
  export -f within
  XLA_PYTHON_CLIENT_PREALLOCATE=false xargs -P "${dry:-4}" -I '{}' bash -c '
    left=$(($0 - $(date +%s)))
    if [ "$left" -gt 0 ]; then within "$left" "$@"; fi
  ' "$(($(date +%s) + 270))" "$python" -m experiments run --condition '{}' \
    "${options[@]}" --together 5 --scan True --results "$results" \
    <<<"$conditions" || status=$?
  # The others are not finished, and begin again on another machine.
  finished=$(mktemp -d)
  find "$results" -name result.json -printf '%h\0' |
    xargs -0 -r cp -r -t "$finished"
  tar -czf "$out/grid.tar.gz" -C "$finished" .
  "$python" -m experiments fold "$finished" "$out/$study.jsonl"
  return "$status"
}

dry=
if [ "${1:-}" = --dry ]; then
  dry=1
  export JAX_PLATFORMS=cpu
  shift
else
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
fi
export PYTHONUNBUFFERED=1
if [ $# -gt 1 ]; then # a stage that fails costs no other one
  status=0
  for stage in "$@"; do
    "$BASH" "$script" ${dry:+--dry} "$stage" || status=$?
  done
  exit "$status"
fi
case "${1:-}" in
  prepare) prepare ;;
  tests | steps | large | grid)
    mkdir -p "$out"
    install
    echo "== $1"
    "$1"
    echo "== $1: $SECONDS s"
    ;;
  *)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$script" >&2
    exit 2
    ;;
esac
