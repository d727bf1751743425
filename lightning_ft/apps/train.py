"""``lightning-ft train``: a whole fine-tune from the config's groups, into a run folder."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from lightning_ft.apps.paths import conf_dir

if TYPE_CHECKING:
    from pathlib import Path

    import lightning as L
    from matplotlib.figure import Figure

    from lightning_ft.callbacks.efficiency import Efficiency
    from lightning_ft.callbacks.finetuning import FineTuning
    from lightning_ft.data.module import TextDataModule
    from lightning_ft.tasks.finetuner import FineTuner

log = logging.getLogger(__name__)


@hydra.main(config_path=str(conf_dir()), config_name="train", version_base="1.3")
def main(config: DictConfig) -> float:
    """Train, test, save; print the table. Returns the score ``monitor`` of validation, for sweepers."""
    from lightning_ft.apps import build, ranks

    level = logging.INFO if ranks.is_first() else logging.WARNING  # once of all processes
    logging.getLogger().setLevel(level)
    build.register_resolvers()
    build.tidy_messages(level)
    return train(config)


def train(config: DictConfig) -> float:
    """One run; its folder is Hydra's output directory (:mod:`lightning_ft.apps.runs`).

    On several devices each process runs this (:mod:`lightning_ft.apps.ranks`).

    Raises:
        RequestError: before anything is trained, if a value is out of its range, the folder holds a run, or the data
            have what ``check.fail_on`` names.
    """
    from pathlib import Path

    import lightning as L
    from hydra.core.hydra_config import HydraConfig

    from lightning_ft import save_adapter
    from lightning_ft.apps import build, precision, ranks, runs

    folder, name = Path(HydraConfig.get().runtime.output_dir), HydraConfig.get().runtime.choices["method"]
    ranks.check_folder()
    if ranks.is_first():
        runs.refuse_used(folder)
    build.check(config)
    config.optimizer.lr = build.rate(config, name)
    for advice in precision.advice(config):
        log.warning(advice)
    log.info("Base: %s", config.model.name)  # before the data, whose tokenizer is the model's
    data = build.datamodule(config)
    found, curve = _prepare(config, data, folder)
    L.seed_everything(config.seed, verbose=False)  # after the search, of which the run shows no trace
    method = build.method(config)
    module = build.finetuner(config, data.facts)
    trainer, efficiency = _trainer(config, method)
    ranks.check_count(trainer)
    if ranks.is_first():
        _begin(folder, config, data, trainer, curve)

    alone = config.test_before and ranks.is_first()
    # Not in inference mode: metrics would keep tensors of it, which FSDP2's evaluation can't change.
    first = build.quiet_trainer(config, inference_mode=False) if alone else None
    before = first.test(module, data, verbose=False)[0] if first else {}
    with ranks.together(folder, [f"optimizer.lr={config.optimizer.lr}"]):
        trainer.fit(module, data)
        steps, epochs = trainer.global_step, trainer.current_epoch
        best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
        if best is None:
            log.info(
                "No checkpoint was kept (no validation, or none that counts): the last weights are tested and saved."
            )
        after = trainer.test(module, data, ckpt_path=best, verbose=False)[0]
        together = build.quiet_trainer(config, **build.all_devices(config))
        validation = together.validate(module, data, verbose=False)[0]
        method.finish(module)

        results = {
            "method": name,
            "data": str(data.path),
            "before": before,
            "after": after,
            "validation": validation,
            "monitor": config.monitor,
            "mode": config.mode,
            **_costs(trainer, efficiency),
            "lr": config.optimizer.lr,
            "lr_found": found,
            "rows": data.sizes,
            "steps": steps,
            "epochs": epochs,
            "latency": None,
            "card": module.task.card(),
        }
        card = runs.card_facts(runs.load_config(folder), results) if ranks.is_first() else None
        save_adapter(module, folder / runs.ADAPTER, method.backbone, card)
    if ranks.is_first():
        _end(folder, config, data, module, trainer, results)
    return float(validation.get(config.monitor, float("nan")))


def _prepare(config: DictConfig, data: TextDataModule, folder: Path) -> tuple[bool, Figure | None]:
    """Check the data, and find the learning rate if that is asked for: what the first process does for all.

    Returns:
        Whether the rate was found, and the curve that it was read from.
    """
    from lightning_ft.apps import build, ranks
    from lightning_ft.apps.check import before_training
    from lightning_ft.apps.errors import RequestError

    if config.check.before_training and ranks.is_first():
        before_training(config, data)
    if config.optimizer.lr != build.AUTO:
        return False, None
    if ranks.started() > 1:
        raise RequestError(
            f"optimizer.lr={build.AUTO} looks for the rate in one process, and {ranks.started()} were started: find it"
            " with trainer.devices=1 first, then give it, optimizer.lr=..."
        )
    config.optimizer.lr, curve = _find_rate(config, data, folder)
    return True, curve


def _begin(folder: Path, config: DictConfig, data: TextDataModule, trainer: L.Trainer, curve: Figure | None) -> None:
    """Write the run's config, and tell the loggers."""
    from lightning.pytorch.loggers import CSVLogger

    from lightning_ft.apps import runs
    from lightning_ft.reporting import log_figure

    runs.save_config(folder, config, data.facts)
    # Plain values: W&B would take a DictConfig's groups for texts.
    settings: Any = OmegaConf.to_container(runs.load_config(folder), resolve=True)
    for logger in trainer.loggers:
        logger.log_hyperparams(settings)
    if curve is not None:
        log_figure([logger for logger in trainer.loggers if not isinstance(logger, CSVLogger)], "lr_finder", curve, 0)


def _end(
    folder: Path,
    config: DictConfig,
    data: TextDataModule,
    module: FineTuner,
    trainer: L.Trainer,
    results: dict[str, Any],
) -> None:
    """Write the results, and show them."""
    import os

    from lightning_ft.apps import build, latency, report, runs
    from lightning_ft.apps.restore import restore
    from lightning_ft.files.state import is_shared_out
    from lightning_ft.reporting import log_folder

    adapter = folder / runs.ADAPTER
    results["adapter_bytes"] = sum(file.stat().st_size for file in adapter.iterdir())
    runs.save_results(folder, results)  # before anything that can fail: the run is finished
    log_folder(trainer.loggers, f"adapter-{folder.name}", adapter, "adapter")
    samples = build.as_list(config.samples)
    if (samples or config.latency) and is_shared_out(module):  # whole again, in this process alone
        module, _ = restore(folder, OmegaConf.create())
    predictions = build.predictions(build.quiet_trainer(config), module, data, samples) if samples else []
    if config.latency:
        data.trainer = None  # whose processes share the rows
        results["latency"] = latency.measure(module, data, trainer, config.latency)
        runs.save_results(folder, results)

    report.console.print(report.scores_table(results))
    report.console.print(f"The run lies in {os.path.relpath(folder)}\n", markup=False)
    if samples:
        report.console.print(report.predictions_table(samples, predictions))
    for logger in trainer.loggers:
        logger.finalize("success")


def _find_rate(config: DictConfig, data: TextDataModule, folder: Path) -> tuple[float, Figure]:
    """The rate that Lightning's finder finds, and its curve, which goes into the folder."""
    from lightning_ft.apps import runs
    from lightning_ft.apps.finder import find_rate

    rate, curve = find_rate(config, data)
    curve.savefig(folder / runs.CURVE, dpi=150)
    return rate, curve


def _trainer(config: DictConfig, method: FineTuning) -> tuple[L.Trainer, Efficiency]:
    """The Trainer with the method, the config's callbacks and its loggers; and what measures the costs."""
    from hydra.utils import instantiate

    from lightning_ft.apps import build
    from lightning_ft.callbacks.efficiency import Efficiency

    callbacks = build.callbacks(config)
    efficiency = next((c for c in callbacks if isinstance(c, Efficiency)), None) or Efficiency()
    if efficiency not in callbacks:
        callbacks.append(efficiency)
    loggers = list(instantiate(config.logger, _convert_="all").values())
    return instantiate(
        config.trainer, callbacks=[method, *build.savers(config), *callbacks], logger=loggers, _convert_="all"
    ), efficiency


def _costs(trainer: L.Trainer, efficiency: Efficiency) -> dict[str, Any]:
    """What training took, and on what."""
    import torch

    from lightning_ft.files.card import versions

    device = trainer.strategy.root_device
    return {
        "parameters": efficiency.parameters,
        "trained": efficiency.trained,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "seconds": efficiency.seconds,
        "peak_memory_mib": efficiency.peak_memory_mib,
        "versions": versions(),
    }
