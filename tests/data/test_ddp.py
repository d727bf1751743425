"""Two processes of a Trainer: together they see the data once, and score it as one process does."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from commands import python, reviews, write_csv

SCRIPT = '''
import json, os, sys
from functools import partial
from pathlib import Path
import lightning as L, torch
from lightning_ft import Classification, FineTuner, LoRA, TextDataModule

class Seen(L.Callback):
    """What each batch of each process was."""

    def __init__(self):
        self.rows = {"train": [], "val": []}

    def keep(self, stage, batch, epoch):
        rows = [(ids[mask.bool()].tolist(), int(y)) for ids, mask, y in
                zip(batch["input_ids"], batch["attention_mask"], batch["labels"])]
        self.rows[stage].append((epoch, rows))

    def on_train_batch_start(self, trainer, module, batch, index):
        self.keep("train", batch, trainer.current_epoch)

    def on_validation_batch_start(self, trainer, module, batch, index):
        self.keep("val", batch, trainer.current_epoch)

model, folder, out, devices, streaming = sys.argv[1:]
torch.manual_seed(0)
known = {"known": {"labels": ["bad", "good", "mixed"]}} if streaming == "1" else {}
data = TextDataModule(folder, model, batch_size=4, streaming=streaming == "1", **known)
module = FineTuner(model, Classification(data.labels), partial(torch.optim.SGD, lr=0.0))
module.model.eval()
seen = Seen()
trainer = L.Trainer(
    accelerator="cpu", devices=int(devices), strategy="ddp" if devices != "1" else "auto", max_epochs=2,
    max_steps=1000, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    num_sanity_val_steps=0, callbacks=[LoRA(r=2), seen],
)
trainer.fit(module, data)
scores = trainer.validate(module, data, verbose=False)[0]
Path(out, f"{trainer.global_rank}.json").write_text(json.dumps({"rows": seen.rows, "scores": scores}))
if torch.distributed.is_initialized():  # else gloo's threads may abort the process as it exits
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    for seed, (split, count) in enumerate((("train", 33), ("validation", 17), ("test", 6))):
        write_csv(path / f"{split}.csv", reviews(count, seed))
    return path


def fit(folder: Path, model: str, devices: int, streaming: bool = False) -> list[dict[str, Any]]:
    script, out = folder.parent / "script.py", folder.parent / f"out{devices}"
    script.write_text(SCRIPT)
    out.mkdir()
    cache = str(folder.parent / "cache")
    answer = python(script, model, folder, out, devices, int(streaming), HF_DATASETS_CACHE=cache)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(devices)]


def counted(rank: dict[str, Any], stage: str, epoch: int) -> Counter[str]:
    return Counter(json.dumps(row) for at, batch in rank["rows"][stage] if at == epoch for row in batch)


@pytest.mark.slow
def test_two_processes_see_each_row_once_and_score_as_one(folder: Path, tiny_bert_dir: str) -> None:
    [one], two = fit(folder, tiny_bert_dir, 1), fit(folder, tiny_bert_dir, 2)
    for epoch in range(2):
        whole, parts = counted(one, "train", epoch), [counted(rank, "train", epoch) for rank in two]
        assert {sum(part.values()) for part in parts} == {17}  # 33 rows and one again
        assert not whole - sum(parts, Counter())
        assert counted(one, "val", epoch) == sum((counted(rank, "val", epoch) for rank in two), Counter())
    assert two[0]["rows"]["train"] != two[1]["rows"]["train"]
    for lengths in zip(
        *([[len(r) for r, _ in batch] for _, batch in rank["rows"]["train"]] for rank in two), strict=True
    ):
        assert abs(max(lengths[0]) - max(lengths[1])) <= 4  # like lengths at the same time
    assert two[0]["scores"] == two[1]["scores"] == pytest.approx(one["scores"], rel=1e-5)


@pytest.mark.slow
def test_two_processes_share_a_stream(folder: Path, tiny_bert_dir: str) -> None:
    [one], two = fit(folder, tiny_bert_dir, 1, streaming=True), fit(folder, tiny_bert_dir, 2, streaming=True)
    for epoch in range(2):
        whole, parts = counted(one, "train", epoch), [counted(rank, "train", epoch) for rank in two]
        assert {sum(part.values()) for part in parts} == {16}
        assert not sum(parts, Counter()) - whole
    assert two[0]["scores"] == two[1]["scores"] == pytest.approx(one["scores"], rel=1e-5)
