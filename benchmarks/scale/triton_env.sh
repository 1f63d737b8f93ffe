#!/bin/sh
# Makes a python that has Triton beside all that another has (torch's CPU builds bring none), and prints it:
#   export PARETUNE_TRITON_PYTHON=$(benchmarks/scale/triton_env.sh .triton .venv/bin/python)
set -eu
directory=${1:-.triton}
python=${2:-.venv/bin/python}
[ -x "$directory/bin/python" ] || "$python" -m venv "$directory" >&2
beside=$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf 'import site; site.addsitedir("%s")\n' "$packages" >"$beside/beside.pth"
"$directory/bin/python" -m pip install --quiet --no-deps triton==3.5.0 >&2
cd "$directory" && printf '%s\n' "$(pwd)/bin/python"
