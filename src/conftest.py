"""Modules whose examples can only run where an optional package is installed."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["paretune/optim/kernels/triton_*.py"]
