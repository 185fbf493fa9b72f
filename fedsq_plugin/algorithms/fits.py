"""Whether a row and its options fit a model."""

from __future__ import annotations

from torch import nn

from ..errors import ConfigError, nearest
from ..federation.local import frozen_keys
from ..federation.roles import NORMALISATION, roles
from .options import Options
from .table import Algorithm


def refuse_misfit(row: Algorithm, options: Options, model: nn.Module) -> None:
    """Raise ConfigError for a row that would do nothing of its own on this model, or lacks an option that
    only the user can give."""
    row.check()
    if row.needs_head and options.head is None:
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise ConfigError(
            f"{row.name} treats the head apart from the body: set head to the module path of the model's "
            f"last layer (linear layers: {', '.join(linear) or 'none'})"
        )
    roles(model, options.head)
    refuse_norm_layers(row, options.structural_copy, model)
    if row.phases == "without early layers":
        keys = [name for name, _ in model.named_parameters()]
        paths = [path for path, _ in model.named_modules() if path]
        if not options.frozen_modules:
            raise ConfigError(f"{row.name}: set frozen_modules to the early modules that stay frozen")
        for path in options.frozen_modules:
            if not frozen_keys(keys, (path,)):
                raise ConfigError(f"frozen_modules: the model has no '{path}'{nearest(path, paths)}")


def refuse_norm_layers(row: Algorithm, structural_copy: str, model: nn.Module) -> None:
    """Raise ConfigError where a row treats normalisation layers in a way that makes no sense here."""
    norm = any(isinstance(module, NORMALISATION) for module in model.modules())
    if "without norm layers" in (row.phases, row.exchange) and not norm:
        raise ConfigError(
            f"{row.name} treats normalisation layers apart, and the model has none: use another row"
        )
    follows = structural_copy in ("refresh", "ema")
    if row.view == "dualcopy" and follows and row.exchange == "without norm layers":
        raise ConfigError(
            f"{row.name} with structural_copy '{structural_copy}': it would follow a model whose "
            "normalisation layers no silo has; set structural_copy: fixed or unfreeze"
        )
