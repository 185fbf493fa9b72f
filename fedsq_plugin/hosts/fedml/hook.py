"""What `register()` does to FedML: it replaces functions on their own modules and classes.

Classes are wrapped in place: `from fedml import FedMLRunner` before or after makes no difference. Of
functions only the modules' names are replaced: `from fedml.data import load` before `register()` keeps
FedML's own.
"""

from __future__ import annotations

import functools
import logging
from contextlib import nullcontext
from typing import Any

import torch

from ... import models
from ...algorithms import known
from ...data import registry
from ...data.flamby.backbones import MODELS
from ...data.registry import is_flamby
from ...data.silos import SilosData
from ...dualcopy.precision import refuse_unsupported
from ...errors import ConfigError, in_one_line, nearest
from ...federation.checkpoints import ServerCheckpoints
from ...federation.reseeding import refuse_once
from ...federation.seeding import derive, isolated
from ...federation.task import CLASSIFICATION, Task
from ...models.backbones import PREFIX
from ...run.dry_run import dry_run
from ...run.facts import facts_of
from ...run.plan import Plan, build_view, create_model, plan_of
from ...run.reluise import replace_smooth
from ...run.warm_start import warm_start
from ...settings.agreement import kept_options
from ...settings.config import OPTIONS, Config
from ...settings.config import OURS as OUR_FAMILIES
from ...settings.idle import compiled_for_cpu, untrained_gates, unused
from ...settings.recipe import flat, misplaced, read_loosely, with_numbers
from . import offline
from .arguments import FINDINGS, config_of, known_to_fedml
from .choice import ASKED, asks_for_ours, ignored, is_native, is_ours, is_sp
from .dataset import from_tuple, to_tuple
from .devices import NO_GPU, device_of
from .names import BACKENDS, FEDML_DATASETS, FEDML_MODELS, OTHER_OPTIONS, backend_of, broken_backend, wrong_partition

log = logging.getLogger(__name__)

_registered = False


def register() -> None:
    """Turn the plugin on in FedML, once per process. Raises ConfigError where FedML cannot be imported."""
    global _registered
    if _registered:
        return
    offline.require_home()
    import fedml
    from fedml.arguments import Arguments
    from fedml.core import mlops
    from fedml.core.mlops.mlops_runtime_log import MLOpsRuntimeLog
    from fedml.data import data_loader
    from fedml.device import device
    from fedml.ml.aggregator.agg_operator import FedMLAggOperator
    from fedml.model import model_hub

    offline.quiet_start(mlops)
    offline.checked_start(fedml)
    fedml.collect_env = offline.no_diagnosis
    offline.own_logging(MLOpsRuntimeLog)
    Arguments.load_yaml_config = _load_yaml_config
    fedml.device.get_device = device.get_device = _get_device(device.get_device)
    fedml.data.load = data_loader.load = _load(data_loader.load)
    fedml.model.create = model_hub.create = _create(model_hub.create)
    FedMLAggOperator.agg = staticmethod(_agg(FedMLAggOperator.agg))
    fedml.FedMLRunner.__init__ = _init(fedml.FedMLRunner.__init__)
    _registered = True


def _load_yaml_config(self: Any, path: str) -> dict[str, Any]:
    """FedML goes on without a file that is missing or broken. What is wrong with the keys waits on
    `self`, for the case that something of ours runs."""
    families, found = read_loosely(path)
    found += misplaced(families, OTHER_OPTIONS)
    setattr(self, FINDINGS, getattr(self, FINDINGS, []) + found)
    if reason := broken_backend(flat(families)):
        raise ConfigError(reason)
    asked = bool(families.keys() & set(OUR_FAMILIES)) or any(finding.kind == "family" for finding in found)
    setattr(self, ASKED, getattr(self, ASKED, False) or asked)
    return with_numbers(families)


def _load(original: Any) -> Any:
    @functools.wraps(original)
    def load(args: Any) -> Any:
        if registry.has(args.dataset):
            data = _load_ours(args)
            return to_tuple(data), data.outputs
        if args.dataset not in FEDML_DATASETS:
            known = [*registry.NAMES, *FEDML_DATASETS]
            raise ConfigError(f"data_args.dataset '{args.dataset}' is unknown{nearest(args.dataset, known)}")
        if partition := wrong_partition(args.dataset, str(getattr(args, "partition_method", "homo"))):
            raise ConfigError(partition)
        return original(args)

    return load


def _load_ours(args: Any) -> SilosData:
    """All data; of FLamby's data sets, on several processes, a client process loads those of its own silos, and
    the server's the pooled test data."""
    config = config_of(args)
    if is_sp(vars(args)) or not is_flamby(args.dataset):
        return registry.load(config)
    from .distributed.node import is_client, silos_of

    return registry.load(config, silos_of(args), pooled=not is_client(args))


def _get_device(original: Any) -> Any:
    @functools.wraps(original)
    def get_device(args: Any) -> Any:
        asked = getattr(args, "using_gpu", False) or getattr(args, "gpu_util_parse", None)
        # FedML's own algorithms stay FedML's, its way of finding a device too.
        theirs = not hasattr(args, "federated_optimizer") or (is_native(vars(args)) and not asks_for_ours(vars(args)))
        return device_of(args) if asked and backend_of(vars(args)) in BACKENDS and not theirs else original(args)

    return get_device


def _create(original: Any) -> Any:
    @functools.wraps(original)
    def create(args: Any, output_dim: int) -> Any:
        if args.model in models.names() or args.model in MODELS:
            return create_model(config_of(args), output_dim)
        seeded = getattr(args, "model_seed", None) is not None
        seed = derive("model", config_of(args).seed("model")) if seeded else 0
        try:
            with isolated(seed) if seeded else nullcontext():
                return original(args, output_dim)
        except Exception as error:
            if "no such model definition" not in str(error):
                raise ConfigError(
                    f"model_args.model '{args.model}': FedML cannot make it for {args.dataset} ({in_one_line(error)})"
                ) from error
            if args.model.startswith(PREFIX):
                models.find_backbone(args.model)  # says what a name like this lacks
            homes = ", ".join(FEDML_MODELS.get(args.model, ()))
            hint = f"; it is FedML's for {homes}" if homes else nearest(args.model, models.names())
            raise ConfigError(f"model_args.model '{args.model}' is unknown to FedML for {args.dataset}{hint}") from None

    return create


def _agg(original: Any) -> Any:
    @functools.wraps(original)
    def agg(args: Any, raw_grad_list: Any) -> Any:
        return original(known_to_fedml(args), raw_grad_list)

    return agg


def _init(original: Any) -> Any:
    @functools.wraps(original)
    def init(
        self: Any,
        args: Any,
        device: Any,
        dataset: Any,
        model: Any,
        client_trainer: Any = None,
        server_aggregator: Any = None,
        algorithm_flow: Any = None,
    ) -> None:
        self.reluised, self.notes, args.fedsq_algorithm = None, [], None
        rest = (client_trainer, server_aggregator, algorithm_flow)
        if algorithm_flow is not None:
            original(self, args, device, dataset, model, *rest)
            return
        vars(args).setdefault("fedprox_mu", OPTIONS["fedprox_mu"].default)  # FedML's own FedProx has none
        ours = is_ours(args, custom=client_trainer is not None or server_aggregator is not None)
        if not ours and not asks_for_ours(vars(args)):
            say(self, *_ignored(args))
            original(self, args, device, dataset, model, *rest)
            return
        config = config_of(args)
        say(self, *_option_notes(args, config, ours), *map(str, getattr(args, FINDINGS, [])))
        check_device(config, device)
        torch.set_num_threads(config.threads or torch.get_num_threads())
        if not ours:
            # FedML's own algorithms may take data of another form, which have no public split.
            data = from_tuple(dataset, args.dataset) if config.has_public_split else None
            _warm_start(self, model, config, data, device)
            original(self, args, device, dataset, model, *rest)
            return
        data = _data_of(dataset, args, client_trainer)
        plan = plan_of(config, model, data.task, data.outputs)  # refuses what does not fit before anything is trained
        from .distributed.node import is_client, node, refuse_unreachable, silos_of
        from .security import check_options
        from .simulation import Simulation, refuse_foreign

        check_options(args)
        one_process, own = is_sp(vars(args)), (client_trainer, server_aggregator)
        refuse_foreign(plan, args, *own)  # before a warm start that takes long
        _refuse_once(data, client_trainer)
        if not one_process:
            refuse_unreachable(args, config)
        prepare_host(args)
        checkpoints = _server_checkpoints(config) if one_process or not is_client(args) else None
        plan = _tried(self, model, plan, data, None if one_process else silos_of(args) or None, device, client_trainer)
        if checkpoints is not None and not checkpoints.resumes:
            _warm_start(self, model, config, data, device, plan.task)
        elif config.relu_ise:
            replace_smooth(model)  # the weights come from the server, or from the checkpoint
        view = build_view(model, plan)
        parts: Any = (args, device, data, view, plan, *own, checkpoints)
        self.runner = Simulation(*parts) if one_process else node(*parts)
        self.notes += [*(checkpoints.notes if checkpoints is not None else ()), *plan.notes]

    return init


def _data_of(dataset: Any, args: Any, trainer: Any) -> SilosData:
    from .adapters import with_own_task

    return with_own_task(from_tuple(dataset, args.dataset), trainer)


def _tried(
    runner: Any, model: Any, plan: Plan, data: SilosData, silos: list[int] | None, device: Any, trainer: Any
) -> Plan:
    """The plan after the dry run. What a user's own trainer does with batches is not known here."""
    from .adapters import hand_over, trains_as_ours

    if not trains_as_ours(trainer):
        return plan
    plan, found = dry_run(model, plan, data, silos, device)
    say(runner, *found)
    hand_over(plan, trainer)
    return plan


def _refuse_once(data: SilosData, trainer: Any) -> None:
    """Refuse training data that our trainer could not pass in every round. A user's own may know better."""
    from .adapters import is_ours

    for silo, loader in data.train.items() if is_ours(trainer) else ():
        refuse_once(loader, silo)


def _warm_start(
    runner: Any, model: Any, config: Config, data: SilosData | None, device: Any, task: Task = CLASSIFICATION
) -> None:
    done = warm_start(model, config, data, device, task)
    runner.reluised = done.reluised
    say(runner, *done.notes)


def _option_notes(args: Any, config: Config, ours: bool) -> list[str]:
    """The options that have no effect in this run, or little."""
    given = config.model_dump()
    facts = facts_of(given, ours)
    idle = unused(given, facts) if ours else _ignored(args)
    return [*idle, *untrained_gates(given, facts), *compiled_for_cpu(given)]


def _ignored(args: Any) -> list[str]:
    """What FedML's own loop ignores, and the way out."""
    lines, name = ignored(vars(args)), args.federated_optimizer
    if lines and known(name):
        lines.append(f"to run the plugin's {name} in place of FedML's own, set fedsq_args.own_algorithms: true")
    return lines


def say(runner: Any, *lines: str) -> None:
    """Log lines for the user, and keep them in the `notes` of a FedMLRunner."""
    for line in lines:
        log.warning(line)
    runner.notes += lines


def _server_checkpoints(config: Config) -> ServerCheckpoints:
    about = (kept_options(config), config.checkpoint_every, config.comm_round, config.resume)
    return ServerCheckpoints(config.checkpoint_dir, *about)


def check_device(config: Config, device: Any) -> None:
    """Raise ConfigError when a GPU was asked for and the script's device is the CPU, or where the device does
    not do what the recipe asks of it."""
    if config.using_gpu and torch.device(device).type == "cpu":
        raise ConfigError(NO_GPU)
    refuse_unsupported(config.precision, device, "fedsq_args.precision")
    refuse_unsupported(config.structural_precision, device, "fedsq_args.structural_precision")


def prepare_host(args: Any) -> None:
    """What FedML's shared code expects of the arguments, and must not remember from a run before."""
    from fedml.core.dp.fedml_differential_privacy import FedMLDifferentialPrivacy

    if getattr(args, "enable_fhe", False):
        raise ConfigError("enable_fhe: homomorphic encryption is not supported by this plugin's algorithms")
    args.fedsq_algorithm = args.federated_optimizer
    args.enable_wandb = getattr(args, "enable_wandb", False)
    if not getattr(args, "enable_dp", False):
        FedMLDifferentialPrivacy.get_instance().is_enabled = False  # its init never turns it off
