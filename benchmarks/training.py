"""W5, a whole epoch of the bundled reviews; and what the callback adds to a step under Lightning."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import peft
import torch
import transformers
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.measure import PEER, in_turns, ratios
from benchmarks.models import OF_BERT, Size, bert, twin
from lightning_ft import LoRA
from lightning_ft.apps import build
from lightning_ft.apps.paths import conf_dir

COLLATIONS = {"default collation": "random", "group_by_length": "group_by_length"}
BY_HAND = "injected by hand"


def epoch(size: Size, rounds: int) -> Iterator[dict[str, Any]]:
    """W5: as `lightning-ft train` trains, and Hugging Face's Trainer with PEFT: with validation and checkpoint."""
    build.register_resolvers()
    with tempfile.TemporaryDirectory() as folder:
        config = _config(size, folder)
        data = build.datamodule(config)
        facts = data.facts
        losses: dict[str, list[float]] = {}

        def ours() -> None:
            losses.setdefault("ours", []).append(_fit(config, data, facts))

        def theirs(name: str) -> None:
            losses.setdefault(name, []).append(_train(config, data, COLLATIONS[name], folder))

        runs: dict[str, Callable[[], None]] = {"ours": ours, **{name: partial(theirs, name) for name in COLLATIONS}}
        times = in_turns(runs, rounds, warm_up=0)  # an epoch is its own warm-up
    for name in COLLATIONS:
        mean = {"ours": statistics.fmean(losses["ours"]), PEER: statistics.fmean(losses[name])}
        yield {
            "case": name,
            **ratios({PEER: times[name], "ours": times["ours"]}),
            "validation_loss": mean,
        }


def callback(size: Size, rounds: int) -> Iterator[dict[str, Any]]:
    """A step under Lightning: the method's callback, and a module that was injected before."""
    base = bert(size)
    times: dict[str, list[float]] = {BY_HAND: [], "ours": []}
    for turn in range(rounds + 1):
        for name, found in times.items():
            module = _Raw(twin(base))
            method = LoRA(r=8, target_modules=OF_BERT)
            if name == BY_HAND:
                method.inject(module)
            watch = _Watch()
            trainer = L.Trainer(
                max_steps=size.lightning_steps, callbacks=[watch] if name == BY_HAND else [method, watch],
                accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(module, _batches(size))
            if turn:
                found.append(statistics.median(watch.seconds))
    yield {"case": "small batch", **ratios(times, peer=BY_HAND)}


class _Raw(L.LightningModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


class _Watch(L.Callback):
    """From the start of each batch to that of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def _batches(size: Size) -> DataLoader[Any]:
    rows: Any = [
        {
            "input_ids": torch.randint(0, size.bert.get("vocab_size", 30522), (size.few_rows, size.few_tokens)),
            "labels": torch.randint(0, 2, (size.few_rows,)),
        }
        for _ in range(size.lightning_steps)
    ]
    return DataLoader(rows, batch_size=None)


def _config(size: Size, folder: str) -> Any:
    """That of `lightning-ft train` for one epoch; what it writes goes into the folder."""
    overrides = [
        "trainer.max_epochs=1", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu",
        f"trainer.default_root_dir={folder}", f"callbacks.checkpoint.dirpath={folder}/checkpoints",
        f"logger.csv.save_dir={folder}", f"data.path={size.data}", "data.cache=false",
    ]  # fmt: skip
    if size.model is not None:
        overrides += ["model=hub", f"model.name={size.model}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("train", overrides)
    config.optimizer.lr = build.rate(config, "lora")
    return config


def _fit(config: Any, data: Any, facts: Any) -> float:
    """Train, and give the validation's loss."""
    L.seed_everything(config.seed, verbose=False)
    module = build.finetuner(config, facts)
    callbacks = build.callbacks(config)
    loggers = list(instantiate(config.logger, _convert_="all").values())
    trainer = instantiate(
        config.trainer, callbacks=[build.method(config), *callbacks], logger=loggers, _convert_="all"
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer.callback_metrics["val/loss"].item()


def _train(config: Any, data: Any, sampling: str, folder: str) -> float:
    """The same by Hugging Face's Trainer and PEFT."""
    transformers.set_seed(config.seed)
    labels = len(data.labels)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=labels)
    method = config.method
    settings = peft.LoraConfig(
        r=method.r, lora_alpha=method.alpha, lora_dropout=method.dropout, target_modules=method.target_modules,
        task_type="SEQ_CLS",
    )  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=str(Path(folder) / "theirs"), num_train_epochs=1, per_device_train_batch_size=data.batch_size,
        per_device_eval_batch_size=2 * data.batch_size, learning_rate=config.optimizer.lr,
        weight_decay=config.optimizer.weight_decay, lr_scheduler_type="linear", warmup_steps=config.scheduler.warmup,
        max_grad_norm=config.trainer.gradient_clip_val, logging_steps=config.trainer.log_every_n_steps,
        eval_strategy="epoch", save_strategy="epoch", report_to="none", use_cpu=True, disable_tqdm=True,
        train_sampling_strategy=sampling, length_column_name="length", seed=config.seed,
    )  # fmt: skip
    trainer = transformers.Trainer(
        peft.get_peft_model(model, settings), arguments, transformers.DataCollatorWithPadding(data.tokenizer),
        data.splits["train"], data.splits["validation"], compute_metrics=_accuracy,
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)


def _accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}
