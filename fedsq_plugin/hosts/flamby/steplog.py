"""What FLamby's strategies write for tensorboard while they train, under the same names."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from torch import Tensor, nn


class StepLog:
    """Takes the loss of every step of a client: prints and writes it every `period` steps of a round, and
    the histograms of the parameters once an epoch.

    Args:
        epoch: batches of the client's data.
        updates: steps of a round.
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
