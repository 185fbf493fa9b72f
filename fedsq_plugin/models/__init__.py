"""Backbones by name and warm start. Importing this package imports torch, not yet torchvision."""

from .backbones import create, early, head, names, pretrained_state, smooth, ungated
from .weights import load_weights, read_state

__all__ = ["create", "early", "head", "load_weights", "names", "pretrained_state", "read_state", "smooth", "ungated"]
