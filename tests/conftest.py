"""One thread, no flaky deadlines: the suite gives the same answer on every machine."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import settings
from tiny_models import world

__all__ = ["world"]

torch.set_num_threads(1)
settings.register_profile("paretune", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("paretune")
