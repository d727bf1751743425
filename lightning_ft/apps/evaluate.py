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
    from lightning_ft.apps.errors import RequestError
    from lightning_ft.apps.restore import restore
    from lightning_ft.tasks.task import score_of

    build.register_resolvers()
    build.tidy_messages(logging.WARNING)
    folder = runs.find_run(run)
    settings = runs.load_config(folder)
    if "sources" in settings.data and any(value is not None for value in overrides.values()):
        raise RequestError("a run on several data sets is scored on its own: leave out data.*.")
    module, data = restore(folder, overrides)
    given = overrides.path is not None
    loader = data.scoring_dataloader(settings.task) if given else data.test_dataloader()

    class Tables(Callback):
        def on_test_epoch_end(self, *_: object) -> None:
            self.found = module.task.tables("test")

    tables = Tables()
    trainer = build.quiet_trainer(settings, callbacks=[tables])
    scores = trainer.test(module, loader, verbose=False)[0]
    shown = sorted(scores, key="test/loss".__eq__)  # the loss last
    said = ", ".join(f"{report.score_name(key)} {score_of(key).text(scores[key])}" for key in shown)
    report.console.print(f"{folder} on {data.path}: {said}", markup=False, soft_wrap=True)
    for name, (columns, rows) in tables.found.items():
        report.console.print(report.task_table(name, columns, rows))
