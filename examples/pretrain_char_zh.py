"""How the bundled Chinese character model was made: a BERT of two layers that reads one character as one token.

    python examples/pretrain_char_zh.py OUT

OUT gets the model as `from_pretrained` loads it. It has seen the bundled Chinese reviews' train split alone, with a
share of the characters masked: enough for `experiment=reviews_zh` where no hub can be reached, and for nothing else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

TRAIN = Path(__file__).resolve().parents[1] / "lightning_ft" / "data" / "bundled" / "reviews_zh" / "train.jsonl"
EPOCHS, BATCH, RATE, LENGTH = 60, 32, 2e-3, 128
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A token a character; what the texts don't have is unknown."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s|."), "isolated")
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=LENGTH,
    )


class Pretraining(L.LightningModule):
    """The characters that are masked (Devlin et al. 2019)."""

    def __init__(self, config: BertConfig, steps: int) -> None:
        super().__init__()
        self.model = BertForMaskedLM(config)
        self.steps = steps

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0.01)
        schedule = OneCycleLR(optimizer, RATE, self.steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(out: str) -> None:
    """Make the tokenizer, train the model, and write both."""
    L.seed_everything(0)
    texts = [json.loads(line)["text"] for line in TRAIN.read_text(encoding="utf-8").splitlines()]
    tokenizer = make_tokenizer(texts)
    rows: Any = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True)["input_ids"]]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    loader = DataLoader(rows, batch_size=BATCH, shuffle=True, collate_fn=collate)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=LENGTH,
        pad_token_id=tokenizer.pad_token_id,
    )
    module = Pretraining(config, EPOCHS * len(loader))
    trainer = L.Trainer(max_epochs=EPOCHS, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(module, loader)
    print(f"{len(texts):,} texts, {len(tokenizer):,} characters, loss {trainer.callback_metrics['train/loss']:.2f}")
    module.model.bert.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
