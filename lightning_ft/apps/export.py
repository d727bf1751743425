"""``lightning-ft export``: write a run's adapter as a PEFT folder, to share or upload."""

from __future__ import annotations

import logging

import hydra
from omegaconf import DictConfig

from lightning_ft.apps.paths import conf_dir


@hydra.main(config_path=str(conf_dir()), config_name="export", version_base="1.3")
def main(config: DictConfig) -> None:
    """Write the adapter with the tokenizer, a model card, and the base's name as others know it."""
    run, out = config.run, config.out

    from lightning_ft.apps import build, report, runs
    from lightning_ft.apps.folders import new_folder
    from lightning_ft.files import peft
    from lightning_ft.files.card import pools_prompt

    build.register_resolvers()
    build.tidy_messages(logging.WARNING)
    folder = runs.find_run(run)
    with new_folder(out, config.overwrite, runs.needed(folder)) as new:
        settings = runs.load_config(folder)
        adapter, tensors = peft.read(folder / runs.ADAPTER)
        adapter["base_model_name_or_path"] = runs.base_name(settings)
        peft.write(new, adapter, tensors, runs.card_facts(settings, runs.load_results(folder)))
        build.save_tokenizer(build.datamodule(settings), new)
    if adapter["peft_type"] in peft.OWN_TYPES:
        loads = "lightning_ft.load_adapter loads it; stock PEFT has no such adapter"
    elif pools_prompt(adapter):
        loads = "lightning_ft.load_adapter loads it; stock PEFT too, but it pools the prompt and predicts otherwise"
    else:
        loads = "PeftModel.from_pretrained loads it over that"
    report.console.print(
        f"{folder} is exported to {out}: {adapter['peft_type']} over {adapter['base_model_name_or_path']}; {loads}.",
        markup=False,
        soft_wrap=True,
    )
