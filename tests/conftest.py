"""Runs before the tests: the project's folder is importable, and nothing asks the network."""

import os
import signal
import sys
from pathlib import Path

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)  # what runs here is tiny; threads would only wait for each other
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# A shell starts what it runs in the background with Ctrl-C ignored, and so would the runs here be.
signal.signal(signal.SIGINT, signal.default_int_handler)
