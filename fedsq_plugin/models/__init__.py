"""Backbones by name, and weights files. Importing this package imports torch, but not torchvision."""

from .backbones import create, find_backbone, names, pretrained_state
from .weights import load_weights, read_state
from .weights_file import open_weights

__all__ = ["create", "find_backbone", "load_weights", "names", "open_weights", "pretrained_state", "read_state"]
