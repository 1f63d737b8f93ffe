#!/bin/sh
# Makes an environment of its own for mergekit, the peer of tests/merging and benchmarks/merge, and prints its python:
#   export PARETUNE_MERGEKIT_PYTHON=$(benchmarks/merge/mergekit_env.sh .mergekit)
set -eu
directory=${1:-.mergekit}
python=${PYTHON:-python3}
constraints=$(dirname "$0")/../../constraints.txt
[ -x "$directory/bin/python" ] || "$python" -m venv "$directory" >&2
"$directory/bin/python" -m pip install --quiet -c "$constraints" mergekit==0.1.5 >&2
cd "$directory" && printf '%s\n' "$(pwd)/bin/python"
