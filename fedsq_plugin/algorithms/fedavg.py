"""FedAvg (McMahan et al. 2017, arXiv 1602.05629): all of the model is trained, sent and averaged."""

from __future__ import annotations

from ..federation.algorithm import Algorithm

FEDAVG = Algorithm("FedAvg", "McMahan et al. 2017, arXiv 1602.05629")
