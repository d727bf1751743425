"""``lightning-ft evaluate``: score a run's adapter."""

from __future__ import annotations

import logging

import hydra
from omegaconf import DictConfig

from lightning_ft.apps.paths import conf_dir


@hydra.main(config_path=str(conf_dir()), config_name="evaluate", version_base="1.3")
def main(config: DictConfig) -> None:
    """Print the scores of the run, in all and by class."""
    run, overrides = config.run, config.data

    from lightning.pytorch.callbacks import Callback

    from lightning_ft.apps import build, report, runs
    from lightning_ft.apps.restore import restore

    build.register_resolvers()
    build.tidy_messages(logging.WARNING)
    folder = runs.find_run(run)
    module, data = restore(folder, overrides)
    given = overrides.path is not None
    loader = data.scoring_dataloader(module.task.labels) if given else data.test_dataloader()

    class PerClass(Callback):
        rows: tuple[list[str], list[list[object]]]

        def on_test_epoch_end(self, *_: object) -> None:
            self.rows = module.task.table("test")

    per_class = PerClass()
    trainer = build.quiet_trainer(runs.load_config(folder), callbacks=[per_class])
    scores = trainer.test(module, loader, verbose=False)[0]
    report.console.print(
        f"{folder} on {data.path}: accuracy {scores['test/accuracy']:.1%}, macro F1 {scores['test/f1']:.1%},"
        f" loss {scores['test/loss']:.3f}",
        markup=False,
        soft_wrap=True,
    )
    report.console.print(report.per_class_table(*per_class.rows))
