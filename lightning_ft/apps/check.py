"""``lightning-ft check``: what is wrong with the data, before it's trained on. In the folder:

check.json    the findings, all rows of each, and what the plots show
check.html    the same as one page to read or to hand on, with the plots
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from lightning_ft.apps.paths import conf_dir

if TYPE_CHECKING:
    from datasets import Dataset

    from lightning_ft.data.mixing import MultiTaskDataModule
    from lightning_ft.data.module import TextDataModule
    from lightning_ft.data.quality import Examined
    from lightning_ft.data.quality.confidence import Embed
    from lightning_ft.data.quality.findings import Finding, Rows

CHECK, PAGE = "check.json", "check.html"

# In short form, before a training: what more would cost time that isn't the user's to wait for each time.
_TOKENISED, _COMPARED = 2_000, 20_000

log = logging.getLogger(__name__)


@hydra.main(config_path=str(conf_dir()), config_name="check", version_base="1.3")
def main(config: DictConfig) -> None:
    """Check the data; print what was found, write its files, and the cleaned copy that was asked for."""
    from lightning_ft.apps import build

    build.register_resolvers()
    build.tidy_messages(logging.WARNING)
    check(config)


def check(config: DictConfig) -> None:
    """One check, into Hydra's output directory.

    Raises:
        RequestError: for an option that makes no sense; and at the end, if there is what ``check.fail_on`` names.
        DataError: if the data can't be read, or nothing would be left of them.
    """
    from hydra.core.hydra_config import HydraConfig

    from lightning_ft.apps import build, check_page, report, runs
    from lightning_ft.apps.errors import RequestError
    from lightning_ft.data.quality import examine

    folder = Path(HydraConfig.get().runtime.output_dir)
    stop = fail_on(config)
    data = build.datamodule(config)
    if data.parts != [data]:
        raise RequestError("check reads one data set: give each of them by itself, data=file data.path=...")
    raw, rows = _read(data)
    cleaned = _fix(str(config.check.fix), raw, rows, data) if config.check.fix else None
    embed = _embed(config, data) if config.check.labels else None
    found = examine(
        rows, data.tokenizer, data.token_limit, embed, carved=_carved(raw), seed=config.seed, track=report.track
    )
    record = _record(
        found,
        rows,
        {
            "data": str(config.data.path),
            "model": runs.base_name(config),
            "limit": data.token_limit,
            "rows": {split: len(its) for split, its in raw.items()},
            "fix": cleaned,
        },
    )
    (folder / CHECK).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(check_page.page(found, rows, record), encoding="utf-8")

    report.console.print(report.findings_table(found.findings, record["rows"], record["data"]))
    for split, said in (cleaned or {}).items():
        report.console.print(f"{config.check.fix}, {split}: {said}", markup=False, soft_wrap=True)
    report.console.print(f"The check lies in {os.path.relpath(folder)}: {PAGE}", markup=False, soft_wrap=True)
    refuse(found.findings, stop)


def before_training(config: DictConfig, data: TextDataModule | MultiTaskDataModule) -> None:
    """The short form that ``train`` begins with: all but what needs the base, said in the log.

    Raises:
        RequestError: if there is what ``check.fail_on`` names.
    """
    stop = fail_on(config)
    for part in data.parts:
        _before_training(config, part, stop)


def _before_training(config: DictConfig, data: TextDataModule, stop: set[str]) -> None:
    from lightning_ft.data.quality import examine

    if data.streaming:
        log.info("Data check: streamed data aren't checked; `lightning-ft check` reads what fits in memory.")
        return
    raw, rows = _read(data)
    few = sum(map(len, raw.values())) <= _COMPARED
    found = examine(
        rows, data.tokenizer, data.token_limit, nearly=few, carved=_carved(raw), most=_TOKENISED, seed=config.seed
    )
    said = [finding for finding in found.findings if finding.severity != "note"]
    if not said:
        log.info("Data check: nothing to complain of.")
    for finding in said:
        log.warning("Data check, %s in %s: %s", finding.kind.replace("_", " "), finding.split, finding.message)
    if said:
        log.info("More of it, and a cleaned copy: `lightning-ft check` with the same data.")
    refuse(found.findings, stop)


def fail_on(config: DictConfig) -> set[str]:
    """The kinds and severities that ``check.fail_on`` names.

    Raises:
        RequestError: for a word that is neither.
    """
    import difflib

    from lightning_ft.apps.build import as_list
    from lightning_ft.apps.errors import RequestError
    from lightning_ft.data.quality.findings import KINDS, SEVERITIES

    asked = as_list(config.check.fail_on)
    for word in asked:
        if word not in (*KINDS, *SEVERITIES):
            near = difflib.get_close_matches(word, (*KINDS, *SEVERITIES), n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise RequestError(
                f"check.fail_on names '{word}': it may name {', '.join(KINDS)}, or {', '.join(SEVERITIES)}.{hint}"
            )
    return set(asked)


def refuse(findings: list[Finding], stop: set[str]) -> None:
    """Raise RequestError if among the findings is one of a kind or a severity in ``stop``."""
    from lightning_ft.apps.errors import RequestError

    bad = [finding for finding in findings if {finding.kind, finding.severity} & stop]
    if bad:
        named = ", ".join(dict.fromkeys(f"{finding.kind} in {finding.split}" for finding in bad))
        raise RequestError(
            f"the data have what check.fail_on names: {named}. {bad[0].message} Mend the data"
            " (`lightning-ft check ... check.fix=FOLDER` writes a cleaned copy), or name less in check.fail_on."
        )


def _read(data: TextDataModule) -> tuple[dict[str, Dataset], dict[str, Rows]]:
    """The splits as they are given, and what the checks see of them."""
    from lightning_ft.data.quality.findings import rows_of

    return data.raw, rows_of(data.raw, data.target, data.columns, str(data.path))


def _carved(raw: Mapping[str, Dataset]) -> bool:
    return not {"validation", "test"} <= set(raw)


def _embed(config: DictConfig, data: TextDataModule) -> Embed:
    """The base's embeddings, on the accelerator that training would take."""
    from transformers import AutoModel

    from lightning_ft.apps import build, report
    from lightning_ft.data.quality.confidence import mean_pooled
    from lightning_ft.tasks.pretrained import load_pretrained

    model = load_pretrained(AutoModel, config.model.name)
    device = build.quiet_trainer(config).strategy.root_device
    return mean_pooled(model, data.tokenizer, data.token_limit, 2 * data.batch_size, device, report.track)


def _fix(out: str, raw: Mapping[str, Dataset], rows: Mapping[str, Rows], data: TextDataModule) -> dict[str, str]:
    """Write the cleaned copy; returns what was done to each split."""
    from lightning_ft.apps.folders import new_folder
    from lightning_ft.data.quality.cleaning import plan, write

    paths = data.path.values() if isinstance(data.path, Mapping) else [data.path]
    cleanings = plan(rows)
    with new_folder(out, None, [Path(path) for path in paths], option="check.fix") as new:
        write(raw, data.columns, cleanings, new)
    return {
        split: f"{len(its) - len(cleanings[split].removed):,} of {len(its):,} rows; {cleanings[split].said()}"
        for split, its in raw.items()
    }


def _record(found: Examined, rows: Mapping[str, Rows], about: Mapping[str, Any]) -> dict[str, Any]:
    """What check.json holds."""
    from dataclasses import asdict
    from datetime import datetime

    from lightning_ft.data.quality.labels import label_counts
    from lightning_ft.data.quality.tokens import histogram
    from lightning_ft.files.card import versions

    lengths = {split: histogram(its.lengths, about["limit"]) for split, its in found.tokens.items()}
    return {
        **about,
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(),
        "label_counts": label_counts(rows),
        "lengths": {split: {"edges": edges, "texts": counts} for split, (edges, counts) in lengths.items()},
        "findings": [asdict(finding) for finding in found.findings],
    }
