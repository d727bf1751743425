"""PEFT's file format: ``adapter_config.json``, ``adapter_model.safetensors``, ``README.md``.

Keys of tensors are relative to the inner Hugging Face model, behind ``base_model.model.``; what a Lightning
module trains outside that model (a head of the user's own) stands behind ``lightning_module.``, which stock
PEFT passes by.

One ``peft_type`` is our own: ``PARTIAL`` holds parameters of the model itself under their own names, for
methods that add none (head only, full fine-tuning). Stock PEFT can't load it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_ft.files.state import StateError

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
INSIDE, OUTSIDE = "base_model.model.", "lightning_module."
OF_BASE = ".base_layer."  # in names of base weights, of which PEFT adds a copy if an embedding is a target

_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def describe_base(root: nn.Module, needs_task: bool = False) -> dict[str, Any]:
    """The fields of ``adapter_config.json`` that say which model and task an adapter is for.

    Args:
        root: the Hugging Face model.
        needs_task: whether PEFT would pass the adapter by, were there no task.
    """
    name = type(root).__name__
    other = "FEATURE_EXTRACTION" if needs_task else None
    task = next((task for ending, task in _TASK_TYPES.items() if name.endswith(ending)), other)
    mapping = None if task else {"base_model_class": name, "parent_library": type(root).__module__}
    return {
        "base_model_name_or_path": getattr(getattr(root, "config", None), "name_or_path", None) or None,
        "task_type": task,
        "auto_mapping": mapping,
        "inference_mode": True,
    }


def write(directory: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write the three files; ``directory`` is made where it doesn't exist.

    Returns:
        The directory.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (directory / CARD).write_text(_card(config, contiguous), encoding="utf-8")
    return directory


def read(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an adapter's folder. Nothing in it is executed.

    Raises:
        FileNotFoundError: if it isn't such a folder.
        StateError: if a file in it is damaged.
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            there = ", ".join(sorted(p.name for p in directory.iterdir())) if directory.is_dir() else "no such folder"
            pickled = directory / "adapter_model.bin"
            cure = (
                f" '{pickled.name}' is a pickle, which can run code: save it again as safetensors."
                if pickled.is_file()
                else ""
            )
            raise FileNotFoundError(f"'{directory}' holds no {name} (it holds: {there}).{cure}")
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
    except ValueError as error:
        raise StateError(f"'{directory / CONFIG}' isn't a valid JSON object: {error}.") from error
    try:
        return config, load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise StateError(f"'{directory / WEIGHTS}' is damaged or incomplete: {error}.") from error


def _card(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    base = config.get("base_model_name_or_path") or "the model it was trained on"
    parameters = sum(tensor.numel() for tensor in tensors.values())
    stock = "" if config["peft_type"] == "PARTIAL" else _LOAD_WITH_PEFT
    return _CARD.format(base=base, method=config["peft_type"], parameters=parameters, stock=stock)


_CARD = """\
---
library_name: peft
tags: [lightning_ft]
---
# {method} adapter

Trained with lightning_ft over `{base}`; {parameters:,} parameters.

```python
import lightning_ft
lightning_ft.load_adapter(model, "path/of/this/folder")  # into the base, with the same head
```
{stock}"""

_LOAD_WITH_PEFT = """
```python
from peft import PeftModel
model = PeftModel.from_pretrained(model, "path/of/this/folder")
```
"""
