"""The tensorboard log of a strategy's training, with the names that FLamby's strategies use."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from torch import Tensor, nn


class StepLog:
    """Logs the steps of a client: the loss every `period` steps of a round, histograms of the parameters once an epoch.

    Args:
        epoch: number of batches of the client's data.
        updates: number of steps of a round.
    """

    def __init__(
        self, model: nn.Module, client: int, epoch: int, updates: int, period: int, logdir: str, basename: str
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._model, self._client = model, client
        self._epoch, self._updates, self._period = epoch, updates, period
        Path(logdir).mkdir(parents=True, exist_ok=True)
        folder = Path(logdir, f"{basename}-{datetime.now()}")
        self._writer = SummaryWriter(log_dir=str(folder))
        self._seen = 0

    def __call__(self, loss: Tensor) -> None:
        step, before = self._seen % self._updates, self._seen // self._epoch
        self._seen += 1
        epochs = self._seen // self._epoch
        if step % self._period == 0:
            value = float(loss)
            print(f"client {self._client}: loss {value:.6f} after {self._seen} batches, {epochs} epochs")
            self._writer.add_scalar(f"client{self._client}/train/Loss", value, self._seen)
        if epochs > before:
            for name, parameter in self._model.named_parameters():
                self._writer.add_histogram(f"client{self._client}/{name}", parameter, epochs)
