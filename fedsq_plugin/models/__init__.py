"""Backbones by name, and weights files. Importing this package imports torch, but not torchvision."""

from .backbones import create, find_backbone, names, pretrained_state
from .weights import load_weights, read_state

__all__ = ["create", "find_backbone", "load_weights", "names", "pretrained_state", "read_state"]
