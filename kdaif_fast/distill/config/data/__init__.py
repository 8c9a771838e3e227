"""Data for a distillation, from where people have them: digits, torchvision, Hugging Face `datasets`, own functions."""

from .loading import Loaded, load_data
from .options import DataOptions, read_data
from .parts import DataParts
from .text import PaddedCollate, Vocabulary

__all__ = ["DataOptions", "DataParts", "Loaded", "PaddedCollate", "Vocabulary", "load_data", "read_data"]
