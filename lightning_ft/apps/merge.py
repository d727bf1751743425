"""``lightning-ft merge``: write a run as a plain Hugging Face model."""

from __future__ import annotations

import logging
from decimal import ROUND_UP, Context
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from lightning_ft.apps.errors import RequestError
from lightning_ft.apps.paths import conf_dir

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor

    from lightning_ft.data.module import TextDataModule
    from lightning_ft.tasks.finetuner import FineTuner


@hydra.main(config_path=str(conf_dir()), config_name="merge", version_base="1.3")
def main(config: DictConfig) -> None:
    """Fold the run's adapter into its base, write the model, and see that what was written predicts the same."""
    run, out = config.run, config.out

    import lightning_ft
    from lightning_ft.apps import build, report, runs
    from lightning_ft.apps.folders import new_folder
    from lightning_ft.apps.restore import restore
    from lightning_ft.callbacks.finetuning import count_parameters
    from lightning_ft.files import peft
    from lightning_ft.files.card import model_card
    from lightning_ft.quantization import dequantize
    from lightning_ft.tasks.pretrained import load_pretrained, quietly

    build.register_resolvers()
    build.tidy_messages(logging.WARNING)
    folder = runs.find_run(run)
    with new_folder(out, config.overwrite, runs.needed(folder)) as new:
        module, data = restore(folder, OmegaConf.create())
        if not module.task.plain:
            raise RequestError(
                f"'{folder}' has the heads of several tasks, and a Hugging Face model has one. Export it, and load it"
                f" into a FineTuner with the same tasks: lightning-ft export run={run} out={out}"
            )
        build.save_tokenizer(data, new)  # before it's used, since it keeps how it was called last
        settings = runs.load_config(folder)
        # In fp32, whatever the run's precision: the difference of the weights is to be seen.
        trainer = build.quiet_trainer(settings, precision="32-true", limit_predict_batches=config.batches)
        unmerged, rows = _values(trainer, module, data)
        try:
            lightning_ft.merge(module, dequantize=True)
        except NotImplementedError as error:
            raise RequestError(
                f"{error} Export it, and load it over its base: lightning-ft export run={run} out={out}"
            ) from error
        dequantize(module.model)  # what no adapter was on; a plain model needs no bitsandbytes
        parameters, _ = count_parameters(module)
        facts = runs.card_facts(settings, runs.load_results(folder))
        card = model_card(peft.describe_base(module.model), parameters, "transformers", facts)
        (new / peft.CARD).write_text(card, encoding="utf-8")
        with quietly():
            module.model.save_pretrained(new)
        module.model = load_pretrained(type(module.model), str(new))
        merged, _ = _values(trainer, module, data)
        change = (merged - unmerged).abs().max().item() if rows else 0.0
        if not change <= config.tolerance:  # nor if it isn't a number
            kind = str(module.model.dtype).removeprefix("torch.")
            raise RequestError(
                f"'{folder}' isn't merged, for a {module.task.compared} would change by {change:.2g}: the weights are"
                f" kept in {kind}, and what is added to them is rounded to that."
                " If it will do: tolerance=1."
            )
    packed = settings.get("quantize")
    was = f", dense where the run had them packed into {packed.kind}" if packed else ""
    compared = f"on {rows:,} test rows no {module.task.compared} differs by more than {_up(change):.1g}"
    report.console.print(
        f"{folder} is merged in {out}: {type(module.model).__name__}, {parameters:,} parameters{was};"
        f" {compared if rows else 'not compared with the run'}.",
        markup=False,
        soft_wrap=True,
    )


def _up(number: float) -> float:
    """The number to one digit, rounded up."""
    return float(Context(prec=1, rounding=ROUND_UP).create_decimal(number))


def _values(trainer: L.Trainer, module: FineTuner, data: TextDataModule) -> tuple[Tensor, int]:
    """Probabilities for the first batches of the test data, the longest texts; and the number of rows."""
    import lightning as L
    import torch

    from lightning_ft.data.sources import DataError
    from lightning_ft.tasks.task import inputs_and_labels

    class Values(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.tuned = module

        def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's
            inputs, _ = inputs_and_labels(batch)
            return module.task.values(module(**inputs))

    if not trainer.limit_predict_batches:
        return torch.empty(0), 0
    try:
        values: Any = trainer.predict(Values(), data.test_dataloader())
    except DataError as error:
        raise RequestError(f"{error} To merge without comparing with the run on its test data: batches=0.") from error
    return torch.cat([batch.flatten() for batch in values]), sum(map(len, values))
