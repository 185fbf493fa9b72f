"""Whether a row and its options fit a model."""

from __future__ import annotations

from torch import nn

from ..errors import ConfigError, nearest
from ..federation.local import frozen_keys
from ..federation.roles import NORMALISATION, roles
from .options import Options
from .table import Algorithm


def refuse_misfit(row: Algorithm, options: Options, model: nn.Module, family: str = "") -> None:
    """Raise ConfigError where an algorithm would do nothing of its own on this model, or lacks an option that
    only the user can give.

    Args:
        family: what a host writes before the name of an option, as `fedsq_args.`.
    """
    row.check()
    if row.needs_head and options.head is None:
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise ConfigError(
            f"{row.name} treats the head apart from the body: set {family}head to the module path of the "
            f"model's last layer (linear layers: {', '.join(linear) or 'none'})"
        )
    try:
        roles(model, options.head)
    except ConfigError as error:
        raise ConfigError(f"{family}{error}") from None
    _refuse_norm_layers(row, options.structural_copy, model)
    if "frozen_modules" in row.options:
        keys = [name for name, _ in model.named_parameters()]
        paths = [path for path, _ in model.named_modules() if path]
        if not options.frozen_modules:
            raise ConfigError(
                f"{row.name}: set {family}frozen_modules to the early modules that stay frozen, as "
                "[conv1, layer1]"
            )
        for path in options.frozen_modules:
            if not frozen_keys(keys, (path,)):
                raise ConfigError(
                    f"{family}frozen_modules: the model has no '{path}'{nearest(path, paths)}"
                )


def _refuse_norm_layers(row: Algorithm, structural_copy: str, model: nn.Module) -> None:
    """Raise ConfigError where an algorithm treats normalisation layers in a way that makes no sense here."""
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
