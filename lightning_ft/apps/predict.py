"""``lightning-ft predict``: classify or complete texts with a run's adapter."""

from __future__ import annotations

import logging
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from lightning_ft.apps.errors import RequestError
from lightning_ft.apps.paths import conf_dir


@hydra.main(config_path=str(conf_dir()), config_name="predict", version_base="1.3")
def main(config: DictConfig) -> None:
    """Print, or write as JSON lines, what the run makes of each text."""
    run, out = config.run, None if config.out is None else Path(config.out).expanduser()

    import json

    from lightning_ft.apps import build, report, runs
    from lightning_ft.apps.restore import restore

    build.register_resolvers()
    build.tidy_messages(logging.WARNING)
    texts = _texts(config.text, config.file)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise RequestError(f"out='{out}' can't be written: name a file in a folder that exists.")
    folder = runs.find_run(run)
    module, data = restore(folder, OmegaConf.create())
    trainer = build.quiet_trainer(runs.load_config(folder))
    predictions = build.predictions(trainer, module, data, texts)
    if out is None:
        report.console.print(report.predictions_table(texts, predictions))
        return
    lines = [json.dumps({"text": t, **p}, ensure_ascii=False) for t, p in zip(texts, predictions, strict=True)]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    report.console.print(f"{len(lines):,} predictions written to {out}")


def _lines(file: Path) -> list[str]:
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"'{file}' isn't UTF-8: {error.reason} at byte {error.start}.") from error
    return content.removesuffix("\n").split("\n")  # not splitlines(), which takes more characters for an end


def _texts(text: object, file: str | None) -> list[str]:
    from lightning_ft.apps.build import as_list

    if (text is None) == (file is None):
        raise RequestError("give either text='...' (or text=[a,b]) or file=PATH, with one text a line.")
    if file is None:
        texts = as_list(text)
    elif (path := Path(file).expanduser()).is_file():
        texts = _lines(path)
    else:
        raise RequestError(f"there is no file '{file}'.")
    empty = [i + 1 for i, t in enumerate(texts) if not t.strip()]
    if empty or not texts:
        raise RequestError(f"text {empty[0]} of {len(texts)} is empty." if empty else "there is no text.")
    return texts
