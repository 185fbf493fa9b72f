"""An algorithm is a row of five choices: view, objective, phases, exchange, server."""

from .table import ALGORITHMS, Algorithm, algorithm

__all__ = ["ALGORITHMS", "Algorithm", "algorithm"]
