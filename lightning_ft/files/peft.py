"""PEFT's file format: ``adapter_config.json``, ``adapter_model.safetensors``, ``README.md``.

Keys of tensors are relative to the inner Hugging Face model, behind ``base_model.model.``; what a Lightning
module trains outside that model (a head of the user's own) stands behind ``lightning_module.``, which stock
PEFT passes by.

Three ``peft_type`` are our own, and stock PEFT can't load them. ``PARTIAL`` holds parameters of the model itself under
their own names, for methods that add none (head only, BitFit, full fine-tuning). ``COMBINED`` holds what several
methods added; ``methods`` in its config has the fields of each. One method that adds something beside others that add
nothing (LoRA and BitFit) is saved as itself, with the parameters that the others trained. ``BOTTLENECK`` holds
adapters: for each adapted module ``adapter_down.weight`` (k, in), ``adapter_down.bias`` (k), ``adapter_up.weight``
(out, k) and ``adapter_up.bias`` (out); :mod:`lightning_ft.methods.adapter` tells its config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_ft.files.card import Facts, Library, model_card, pools_prompt
from lightning_ft.files.state import StateError

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
INSIDE, OUTSIDE = "base_model.model.", "lightning_module."
OF_BASE = ".base_layer."  # in names of base weights, of which PEFT adds a copy if an embedding is a target

OWN_TYPES = frozenset({"PARTIAL", "COMBINED", "BOTTLENECK"})
"""The values of ``peft_type`` that stock PEFT doesn't know."""

_OF_WRAPPERS = (".modules_to_save.", ".original_module.")

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


def write(
    directory: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], facts: Facts | None = None
) -> Path:
    """Write the three files; ``directory`` is made where it doesn't exist.

    Args:
        directory: where.
        config: of ``adapter_config.json``.
        tensors: by their names in PEFT's files.
        facts: what the model card tells beyond that.

    Returns:
        The directory.

    Raises:
        ValueError: if ``facts`` has a key that :class:`~lightning_ft.files.card.Facts` doesn't.
    """
    outside = any(key.startswith(OUTSIDE) for key in tensors)
    own = config["peft_type"] in OWN_TYPES or outside or pools_prompt(config)
    library: Library = "lightning_ft" if own else "peft"
    card = model_card(config, sum(tensor.numel() for tensor in tensors.values()), library, facts)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (directory / CARD).write_text(card, encoding="utf-8")
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
            if not directory.is_dir():
                raise FileNotFoundError(f"There is no folder '{directory}'.")
            there = ", ".join(sorted(p.name for p in directory.iterdir())) or "nothing"
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
        tensors = load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise StateError(f"'{directory / WEIGHTS}' is damaged or incomplete: {error}.") from error
    # With bias="all" PEFT writes a head's bias under the names of its wrapper too.
    return config, {key: t for key, t in tensors.items() if not any(part in key for part in _OF_WRAPPERS)}
