#!/bin/sh
# Makes an environment that is this project's own with DeepSpeed added, and prints its python:
#   export PARETUNE_DEEPSPEED_PYTHON=$(tests/distributed/deepspeed_env.sh .deepspeed)
# PYTHON: the project's python. No operator is compiled; torch and the rest are the project's, not installed twice.
set -eu
directory=${1:-.deepspeed}
python=${PYTHON:-.venv/bin/python}
constraints=$(dirname "$0")/../../constraints.txt
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
[ -x "$directory/bin/pip" ] || "$python" -m venv "$directory" >&2
own=$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
export DS_BUILD_OPS=0
"$directory/bin/python" -m pip install --quiet -c "$constraints" einops hjson msgpack ninja py-cpuinfo >&2
# site.addsitedir, because the project itself may be installed by a .pth file of its own
printf 'import site; site.addsitedir("%s")\n' "$packages" >"$own/project.pth"
"$directory/bin/python" -m pip install --quiet --no-deps --no-build-isolation deepspeed==0.19.8 >&2
cd "$directory" && printf '%s\n' "$(pwd)/bin/python"
