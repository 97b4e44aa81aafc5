"""stub"""
from pathlib import Path
from typing import Any

from torch import Tensor


def read_diffusers_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    raise NotImplementedError
