"""lightning_ft: the fine-tuning suite for PyTorch Lightning.

    L.Trainer(callbacks=[LoRA(r=8)]).fit(my_module, my_data)

The public names are imported when they're first used, so that ``import lightning_ft`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightning_ft.adapters import load_adapter, load_from_checkpoint, merge, save_adapter, unmerge
    from lightning_ft.bank import AdapterBank
    from lightning_ft.callbacks.averaging import Averaging
    from lightning_ft.callbacks.best import BestCheckpoint
    from lightning_ft.callbacks.checkpointing import GradientCheckpointing
    from lightning_ft.callbacks.compile import Compile
    from lightning_ft.callbacks.doctor import Doctor
    from lightning_ft.callbacks.efficiency import Efficiency
    from lightning_ft.callbacks.finetuning import FineTuning
    from lightning_ft.callbacks.liger import LigerKernels
    from lightning_ft.callbacks.overfit import Overfitting
    from lightning_ft.callbacks.packing import PackedWeights
    from lightning_ft.callbacks.recompute import ActivationRecompute
    from lightning_ft.callbacks.retention import Retention
    from lightning_ft.callbacks.trunk_cache import TrunkCache
    from lightning_ft.data.mixing import MultiTaskDataModule
    from lightning_ft.data.module import TextDataModule
    from lightning_ft.data.tags import Tags
    from lightning_ft.injection import InjectionError
    from lightning_ft.methods.adalora import AdaLoRA
    from lightning_ft.methods.adapter import Adapter, drop_adapters
    from lightning_ft.methods.bitfit import BitFit
    from lightning_ft.methods.freezing import GradualUnfreezing, TopLayers
    from lightning_ft.methods.full import FullFineTuning
    from lightning_ft.methods.head import HeadOnly
    from lightning_ft.methods.ia3 import IA3
    from lightning_ft.methods.layernorm import LayerNormTuning
    from lightning_ft.methods.lora import LoRA
    from lightning_ft.methods.prefix import PrefixTuning
    from lightning_ft.methods.prompt import PromptTuning, PTuning
    from lightning_ft.quantization import dequantize, quantize
    from lightning_ft.tasks.classification import Classification
    from lightning_ft.tasks.finetuner import FineTuner
    from lightning_ft.tasks.language import CausalLM, Seq2SeqLM
    from lightning_ft.tasks.multilabel import MultiLabelClassification
    from lightning_ft.tasks.multitask import MultiTask
    from lightning_ft.tasks.ordinal import Ordinal
    from lightning_ft.tasks.penalties.ewc import EWC
    from lightning_ft.tasks.penalties.kl import KL
    from lightning_ft.tasks.penalties.l2 import L2, L2SP
    from lightning_ft.tasks.penalties.penalty import Penalty
    from lightning_ft.tasks.penalties.replay import Replay
    from lightning_ft.tasks.regression import Regression
    from lightning_ft.tasks.tagging import TokenClassification

_HOMES = {
    "ActivationRecompute": "lightning_ft.callbacks.recompute",
    "AdaLoRA": "lightning_ft.methods.adalora",
    "Adapter": "lightning_ft.methods.adapter",
    "AdapterBank": "lightning_ft.bank",
    "Averaging": "lightning_ft.callbacks.averaging",
    "BestCheckpoint": "lightning_ft.callbacks.best",
    "BitFit": "lightning_ft.methods.bitfit",
    "CausalLM": "lightning_ft.tasks.language",
    "Classification": "lightning_ft.tasks.classification",
    "Compile": "lightning_ft.callbacks.compile",
    "Doctor": "lightning_ft.callbacks.doctor",
    "EWC": "lightning_ft.tasks.penalties.ewc",
    "Efficiency": "lightning_ft.callbacks.efficiency",
    "FineTuner": "lightning_ft.tasks.finetuner",
    "FineTuning": "lightning_ft.callbacks.finetuning",
    "FullFineTuning": "lightning_ft.methods.full",
    "GradientCheckpointing": "lightning_ft.callbacks.checkpointing",
    "GradualUnfreezing": "lightning_ft.methods.freezing",
    "HeadOnly": "lightning_ft.methods.head",
    "IA3": "lightning_ft.methods.ia3",
    "InjectionError": "lightning_ft.injection",
    "KL": "lightning_ft.tasks.penalties.kl",
    "L2": "lightning_ft.tasks.penalties.l2",
    "L2SP": "lightning_ft.tasks.penalties.l2",
    "LayerNormTuning": "lightning_ft.methods.layernorm",
    "LigerKernels": "lightning_ft.callbacks.liger",
    "LoRA": "lightning_ft.methods.lora",
    "MultiLabelClassification": "lightning_ft.tasks.multilabel",
    "MultiTask": "lightning_ft.tasks.multitask",
    "MultiTaskDataModule": "lightning_ft.data.mixing",
    "Ordinal": "lightning_ft.tasks.ordinal",
    "Overfitting": "lightning_ft.callbacks.overfit",
    "PTuning": "lightning_ft.methods.prompt",
    "PackedWeights": "lightning_ft.callbacks.packing",
    "Penalty": "lightning_ft.tasks.penalties.penalty",
    "PrefixTuning": "lightning_ft.methods.prefix",
    "PromptTuning": "lightning_ft.methods.prompt",
    "Regression": "lightning_ft.tasks.regression",
    "Replay": "lightning_ft.tasks.penalties.replay",
    "Retention": "lightning_ft.callbacks.retention",
    "Seq2SeqLM": "lightning_ft.tasks.language",
    "Tags": "lightning_ft.data.tags",
    "TextDataModule": "lightning_ft.data.module",
    "TokenClassification": "lightning_ft.tasks.tagging",
    "TopLayers": "lightning_ft.methods.freezing",
    "TrunkCache": "lightning_ft.callbacks.trunk_cache",
    "dequantize": "lightning_ft.quantization",
    "drop_adapters": "lightning_ft.methods.adapter",
    "load_adapter": "lightning_ft.adapters",
    "load_from_checkpoint": "lightning_ft.adapters",
    "merge": "lightning_ft.adapters",
    "quantize": "lightning_ft.quantization",
    "save_adapter": "lightning_ft.adapters",
    "unmerge": "lightning_ft.adapters",
}

__all__ = [  # noqa: RUF022 - by use
    "LoRA", "AdaLoRA", "Adapter", "IA3", "PromptTuning", "PTuning", "PrefixTuning", "BitFit", "LayerNormTuning",
    "TopLayers", "GradualUnfreezing", "FullFineTuning", "HeadOnly", "FineTuning",
    "merge", "unmerge", "save_adapter", "load_adapter", "load_from_checkpoint", "AdapterBank", "drop_adapters",
    "quantize", "dequantize",
    "InjectionError",
    "FineTuner", "Classification", "MultiTask", "TextDataModule", "MultiTaskDataModule", "Efficiency",
    "TokenClassification", "Tags", "MultiLabelClassification", "Ordinal", "Regression", "CausalLM", "Seq2SeqLM",
    "Penalty", "L2", "L2SP", "EWC", "KL", "Replay", "Retention", "Overfitting", "Averaging", "BestCheckpoint",
    "GradientCheckpointing", "ActivationRecompute", "PackedWeights", "LigerKernels", "Compile", "Doctor",
    "TrunkCache",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lightning_ft' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
