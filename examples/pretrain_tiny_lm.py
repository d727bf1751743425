"""How the bundled tiny language model was made: a Llama of 0.9 million parameters, with a tokenizer of its own.

    python examples/pretrain_tiny_lm.py OUT [FOLDER]

OUT gets the model as `from_pretrained` loads it. The text is this project's own (its documents and bundled reviews)
and, where FOLDER holds them, four public data sets, each in a folder of its name:

gsm8k            train.jsonl: school problems in arithmetic (OpenAI, MIT)
tinyshakespeare  input.txt: plays (public domain)
pros_cons        IntegratedPros.txt, IntegratedCons.txt: product opinions (Bing Liu, CC BY 4.0)
subj             quote.tok.gt9.5000, plot.tok.gt9.5000: on films (Bo Pang and Lillian Lee, CC BY 4.0)

It writes English of a kind, and knows nothing: it's for demos and tests, where no hub can be reached.
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROJECT = Path(__file__).resolve().parents[1]
BLOCK, BATCH, STEPS, RATE = 256, 16, 1600, 4e-3
VOCABULARY = 1536


def texts(folder: Path | None) -> list[str]:
    """All texts to learn from; those of an evaluation split, and what the demo teaches, are left out."""
    found = [(PROJECT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")]
    for file in sorted((PROJECT / "lightning_ft" / "data" / "bundled" / "reviews_en").glob("train.jsonl")):
        found += [row["text"] for row in _rows(file)]
    if folder is not None:
        found += [f"{row['question']}\n{row['answer']}" for row in _rows(folder / "gsm8k" / "train.jsonl")]
        found += (folder / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8").split("\n\n")
        for name in ("IntegratedPros.txt", "IntegratedCons.txt"):
            opinions = (folder / "pros_cons" / name).read_text(encoding="latin-1")
            found += re.findall(r"<\w+>\s*(.+?)\s*</\w+>", opinions)
        for name in ("quote.tok.gt9.5000", "plot.tok.gt9.5000"):
            found += map(_untokenised, (folder / "subj" / name).read_text(encoding="latin-1").splitlines())
    # What the calculator annotations of gsm8k say is in the text beside them.
    return [re.sub(r"<<.*?>>", "", text).strip() for text in found]


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _untokenised(line: str) -> str:
    """A sentence without the spaces that were put around its punctuation."""
    return re.sub(r" ([.,;:!?')])", r"\1", re.sub(r"([(]) ", r"\1", line)).replace(" n't", "n't").strip()


def train_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE, so that it reads any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


class Pretraining(L.LightningModule):
    """The next token of each of a block's tokens."""

    def __init__(self, config: LlamaConfig, steps: int) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(config)
        self.steps = steps

    def training_step(self, blocks: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=blocks, labels=blocks).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, blocks: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.model(input_ids=blocks, labels=blocks).loss, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = OneCycleLR(optimizer, RATE, self.steps, pct_start=0.05)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(out: str, folder: str | None = None) -> None:
    """Train the tokenizer and the model, and write both."""
    L.seed_everything(0)
    corpus = texts(Path(folder) if folder else None)
    random.Random(0).shuffle(corpus)
    tokenizer = train_tokenizer(corpus)
    encoded = tokenizer(corpus, add_special_tokens=False)["input_ids"]
    stream = [token for ids in encoded for token in (tokenizer.bos_token_id, *ids, tokenizer.eos_token_id)]
    blocks = torch.tensor(stream[: len(stream) // BLOCK * BLOCK]).view(-1, BLOCK)
    held_out = max(1, len(blocks) // 50)
    print(f"{len(corpus):,} texts, {len(stream):,} tokens, {len(blocks):,} blocks, {held_out} of them held out")

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    steps = min(STEPS, 4 * (len(blocks) - held_out) // BATCH)
    module = Pretraining(config, steps)
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(
        module,
        DataLoader(blocks[held_out:], batch_size=BATCH, shuffle=True),  # type: ignore[arg-type]
        DataLoader(blocks[:held_out], batch_size=BATCH),  # type: ignore[arg-type]
    )
    loss = float(trainer.validate(module, DataLoader(blocks[:held_out], batch_size=BATCH))[0]["val/loss"])  # type: ignore[arg-type]
    print(f"held-out loss {loss:.3f} nats a token, perplexity {math.exp(loss):.1f}")
    module.model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
