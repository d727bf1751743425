"""W5, a whole epoch of the bundled reviews; and what the callback adds to a step under Lightning."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
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

from benchmarks.measure import LIMIT, PEER, in_turns, ratios, step_by_step
from benchmarks.models import OF_BERT, Size, bert, twin
from lightning_ft import LoRA
from lightning_ft.apps import build
from lightning_ft.apps.paths import conf_dir
from lightning_ft.tasks.classification import Classification
from lightning_ft.tasks.finetuner import FineTuner

COLLATIONS = {"default collation": "random", "group_by_length": "group_by_length"}
BY_HAND = "injected by hand"
WARM_UP = 5


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
    """A step under Lightning: the method's callback, and a module that was injected before; also without Lightning, and
    with all that `lightning-ft train` has on."""
    base, method = bert(size), LoRA(r=8, target_modules=OF_BERT)
    shape, words = (size.few_rows, size.few_tokens), size.bert.get("vocab_size", 30522)
    batches = [
        {"input_ids": torch.randint(0, words, shape), "labels": torch.randint(0, 2, shape[:1])}
        for _ in range(WARM_UP + rounds + 1)
    ]
    quiet: dict[str, Any] = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip

    def without_lightning(batches: Iterable[Any]) -> None:
        module = _Raw(twin(base))
        method.inject(module)
        optimizer = module.configure_optimizers()
        for i, batch in enumerate(batches):
            optimizer.zero_grad()
            module.training_step(batch, i).backward()
            optimizer.step()

    def by_hand(batches: Iterable[Any]) -> None:
        module = _Raw(twin(base))
        method.inject(module)
        L.Trainer(**quiet).fit(module, batches)

    def ours(batches: Iterable[Any]) -> None:
        L.Trainer(**quiet, callbacks=[LoRA(r=8, target_modules=OF_BERT)]).fit(_Raw(twin(base)), batches)

    def command(batches: Iterable[Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            config = _config(size, folder)
            task, scheduler = Classification(["bad", "good"]), instantiate(config.scheduler)
            module = FineTuner(twin(base), task, build.optimizer(config), scheduler)
            _trainer(config, LoRA(r=8, target_modules=OF_BERT)).fit(module, batches)

    loops = {LIMIT: without_lightning, BY_HAND: by_hand, "ours": ours, "ours, lightning-ft train": command}
    yield {"case": "small batch", **ratios(step_by_step(loops, batches, WARM_UP), peer=BY_HAND)}


class _Raw(L.LightningModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


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
    trainer = _trainer(config, build.method(config))
    trainer.fit(module, data)
    return trainer.callback_metrics["val/loss"].item()


def _trainer(config: Any, method: L.Callback) -> L.Trainer:
    loggers = list(instantiate(config.logger, _convert_="all").values())
    callbacks = [method, *build.callbacks(config)]
    return instantiate(config.trainer, callbacks=callbacks, logger=loggers, _convert_="all")


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
