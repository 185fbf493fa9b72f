"""DualCopy: a plain network under fixed gates. Also validation, a cache of gates, and ReLU-isation."""

from .activations import GateKind
from .cache import GateCache
from .compiled import Compiled
from .passes import Gate
from .reluise import lambdas, replace_by_lambda, replace_by_relu
from .smooth import LambdaActivation, lambda_activation, target_lambda
from .validation import Finding, validate
from .wrapper import DualCopy

__all__ = [
    "Compiled",
    "DualCopy",
    "Finding",
    "Gate",
    "GateCache",
    "GateKind",
    "LambdaActivation",
    "lambda_activation",
    "lambdas",
    "replace_by_lambda",
    "replace_by_relu",
    "target_lambda",
    "validate",
]
