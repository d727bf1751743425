"""``lightning-ft train``: a whole fine-tune from the config's groups, into a run folder."""

from __future__ import annotations

import logging
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from lightning_ft.apps.paths import conf_dir

log = logging.getLogger(__name__)


@hydra.main(config_path=str(conf_dir()), config_name="train", version_base="1.3")
def main(config: DictConfig) -> float:
    """Train, test, save; print the table. Returns the test score, for sweepers."""
    from lightning_ft.apps import build

    build.register_resolvers()
    build.tidy_messages(logging.INFO)
    return train(config)


def train(config: DictConfig) -> float:
    """One run; its folder is Hydra's output directory (:mod:`lightning_ft.apps.runs`)."""
    import json
    import os
    from pathlib import Path

    import lightning as L
    import torch
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate

    from lightning_ft import save_adapter
    from lightning_ft.apps import build, latency, report, runs
    from lightning_ft.callbacks.efficiency import Efficiency
    from lightning_ft.callbacks.finetuning import count_parameters
    from lightning_ft.files.card import versions
    from lightning_ft.reporting import log_folder

    folder = Path(HydraConfig.get().runtime.output_dir)
    L.seed_everything(config.seed, verbose=False)
    log.info("Base: %s", config.model.name)  # before the data, whose tokenizer is the model's
    data, method = build.datamodule(config), build.method(config)
    if config.optimizer.lr is None:
        config.optimizer.lr = method.default_lr
    module = build.finetuner(config, data.labels, data.label_counts)
    runs.save_config(folder, config, data.labels)

    before = build.quiet_trainer().test(module, data, verbose=False)[0] if config.test_before else {}

    callbacks = list(instantiate(config.callbacks, _convert_="all").values())
    efficiency = next((c for c in callbacks if isinstance(c, Efficiency)), None) or Efficiency()
    if efficiency not in callbacks:
        callbacks.append(efficiency)
    loggers = list(instantiate(config.logger, _convert_="all").values())
    trainer: L.Trainer = instantiate(config.trainer, callbacks=[method, *callbacks], logger=loggers, _convert_="all")
    # Plain values: W&B would take a DictConfig's groups for texts.
    settings: Any = OmegaConf.to_container(runs.load_config(folder), resolve=True)
    for logger in loggers:
        logger.log_hyperparams(settings)

    trainer.fit(module, data)
    steps, epochs = trainer.global_step, trainer.current_epoch
    best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
    if best is None:
        log.info("No checkpoint was kept (validation never ran): the last weights are tested and saved.")
    after = trainer.test(module, data, ckpt_path=best, verbose=False)[0]

    samples = build.as_list(config.samples)
    predictions = build.predictions(module, data, samples) if samples else []
    parameters, trained = count_parameters(module)
    device = trainer.strategy.root_device
    results = {
        "method": type(method).__name__,
        "data": str(config.data.path),
        "before": before,
        "after": after,
        "parameters": parameters,
        "trained": trained,
        "lr": config.optimizer.lr,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "seconds": efficiency.seconds,
        "peak_memory_mib": efficiency.peak_memory_mib,
        "rows": {split: len(rows) for split, rows in data.splits.items()},
        "steps": steps,
        "epochs": epochs,
        "versions": versions(),
    }
    card = runs.card_facts(runs.load_config(folder), results)
    adapter = save_adapter(module, folder / runs.ADAPTER, method.backbone, card)
    results["adapter_bytes"] = sum(file.stat().st_size for file in adapter.iterdir())
    log_folder(loggers, f"adapter-{folder.name}", adapter, "adapter")
    results["latency"] = latency.measure(module, data, trainer, config.latency) if config.latency else None
    (folder / runs.RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    report.console.print(report.scores_table(results))
    report.console.print(f"The run lies in {os.path.relpath(folder)}\n", markup=False)
    if samples:
        report.console.print(report.predictions_table(samples, predictions))
    for logger in loggers:
        logger.finalize("success")
    return float(after["test/f1"])
