"""Importing and exporting weights.

``golden/guided_diffusion.json`` holds parameter names and shapes and some outputs of the real guided-diffusion U-Net
(github.com/openai/guided-diffusion, two small architectures), with the weights of `formula_weights`.
"""

import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rgcp_core.checkpoints import export_guided_diffusion, import_prior, read_state_dict
from rgcp_core.errors import UserError
from rgcp_core.prior import Prior
from rgcp_core.pull import PINS_FILE, PublicPrior, pull_prior

ROOT = Path(__file__).parents[2]
SEED = ROOT / "../shared/priors/faces64-seed.pt"
FACTS = {"licence": "for tests", "source": "a formula"}


def formula_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Weights that need no random generator, scaled by the root of their fan-in."""
    weights = {}
    for i, (key, shape) in enumerate(shapes.items()):
        count = torch.Size(shape).numel()
        wave = torch.cos(torch.arange(count, dtype=torch.float64) * (0.7 + 0.01 * i) + i)
        weights[key] = (wave / (count / shape[0]) ** 0.5).float().reshape(*shape)
    return weights


def formula_input(size: int) -> tuple[Tensor, Tensor]:
    """(2,3,S,S) and two times."""
    x = torch.sin(torch.arange(2 * 3 * size * size, dtype=torch.float64) * 0.37).float()
    return x.reshape(2, 3, size, size), torch.tensor([3, 700])
