"""LightningModules as users write them: none knows anything of lightning_ft.

Each brings its data, an example input, and ``outputs(batch)``, so that a test can treat them alike.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

VOCABULARY, CLASSES, ROWS = 50, 3, 24


def token_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCABULARY, (ROWS, 7), generator=generator)
    return TensorDataset(tokens, torch.randint(0, CLASSES, (ROWS,), generator=generator))


def vector_data(*shape: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(ROWS, *shape, generator=generator),
        torch.randint(0, CLASSES, (ROWS,), generator=generator),
    )


def small(config: Any, **more: Any) -> Any:
    common = {"vocab_size": VOCABULARY, "num_labels": CLASSES, "pad_token_id": 0}
    return config(**{**common, **more})


BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


class Classifier(L.LightningModule):
    """What the modules below have in common: plain Lightning."""

    data = staticmethod(token_data)

    def outputs(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.outputs(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.outputs(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self.outputs(batch[0]), batch[1]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.outputs(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data(), batch_size=8)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def example(self) -> Tensor:
        return self.data().tensors[0][:5]


class BertInInit(Classifier):
    """A Hugging Face model with its head, built in __init__."""

    def __init__(self) -> None:
        super().__init__()
        self.model = BertForSequenceClassification(small(BertConfig, **BERT))

    def outputs(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x).logits


class TrunkInSetup(Classifier):
    """A bare trunk, built in setup(), under a head of the user's own; a schedule beside the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, CLASSES)

    def setup(self, stage: str) -> None:
        if not hasattr(self, "trunk"):
            torch.manual_seed(3)
            self.trunk = BertModel(small(BertConfig, **BERT))

    def outputs(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(input_ids=x).last_hidden_state.mean(dim=1))

    def configure_optimizers(self) -> Any:
        # Over the head alone, as who had frozen the trunk by hand would write it.
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)]


class DistilBertInConfigureModel(Classifier):
    """Built in configure_model()."""

    def __init__(self) -> None:
        super().__init__()
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            torch.manual_seed(3)
            config = small(
                DistilBertConfig, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=16,
                dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
            )  # fmt: skip
            self.model = DistilBertForSequenceClassification(config)

    def outputs(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x).logits


class CNN(Classifier):
    """Plain torch, with BatchNorm in the base and in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
            nn.Linear(36, 16), nn.BatchNorm1d(16, affine=False), nn.ReLU(), nn.Linear(16, 16),
        )  # fmt: skip
        self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, CLASSES))

    data = staticmethod(lambda: vector_data(1, 8, 8))

    def outputs(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class GPT2(Classifier):
    """A language model with its pretrained, tied head; its linear layers are Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        config = small(
            GPT2Config, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        self.lm = GPT2LMHeadModel(config)

    def outputs(self, x: Tensor) -> Tensor:
        return self.lm(input_ids=x).logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.lm(input_ids=batch[0], labels=batch[0]).loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.lm(input_ids=batch[0], labels=batch[0]).loss)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.lm(input_ids=batch[0], labels=batch[0]).loss)


class ManualTwoOptimizers(Classifier):
    """Manual optimization, an optimizer for the encoder and one for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16))
        self.head = nn.Linear(16, CLASSES)

    data = staticmethod(lambda: vector_data(8))

    def outputs(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.outputs(batch[0]), batch[1]))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.encoder.parameters(), lr=1e-2),
            torch.optim.SGD(self.head.parameters(), lr=1e-1),
        ]


class TorchTransformer(Classifier):
    """torch's own encoder, whose layers take a fused path in evaluation that calls none of their parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, CLASSES)

    def outputs(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=x == 0).mean(dim=1))


MODULES: dict[type[Classifier], dict[str, Any]] = {
    BertInInit: {},
    TrunkInSetup: {"target_modules": "all-linear"},
    DistilBertInConfigureModel: {"target_modules": "attention"},
    CNN: {"backbone": "body", "target_modules": "all-linear"},
    GPT2: {"target_modules": "all-linear"},
    ManualTwoOptimizers: {"backbone": "encoder", "target_modules": ["0", "2"]},
    TorchTransformer: {"backbone": "encoder", "target_modules": ["linear1", "linear2"]},
}
"""Each module, and what besides ``r`` the one added line needs to say."""


def make(kind: type[Classifier]) -> Classifier:
    """The module over the same random "pretrained" weights each time."""
    torch.manual_seed(7)
    return kind()


def trainer(*callbacks: Any, **more: Any) -> L.Trainer:
    """A quiet Trainer on the CPU."""
    quiet = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2,
    }  # fmt: skip
    return L.Trainer(callbacks=list(callbacks), **{**quiet, **more})
