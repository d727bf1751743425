"""Pretrained models and tokenizers, from a folder or the hub, with errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ft.errors import UserError
from lightning_ft.injection import find_base
from lightning_ft.quantization import load_quantized, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lightning_ft.quantization import Quantization


class ModelNotFoundError(UserError, OSError):
    """There is no such pretrained model here, nor on the hub as far as it can be reached, or it doesn't load."""


def load_pretrained(auto_class: Any, name: str, quantize: Quantization | None = None, **kwargs: Any) -> Any:
    """``auto_class.from_pretrained(name, **kwargs)``, quietly.

    Args:
        auto_class: an Auto class of transformers.
        name: a local folder or a name on the hub.
        quantize: how the pretrained part is packed, weight by weight as they're read, so that all of them are never in
            memory at once.
        kwargs: passed on.

    Raises:
        ModelNotFoundError: if there is no such folder, and the hub doesn't have it or can't be reached.
        QuantizationError: if it can't be packed.
    """
    try:
        with quietly():
            if _WEIGHTLESS.get() and hasattr(auto_class, "from_config"):
                return _from_config(auto_class, name, quantize, **kwargs)
            if quantize is not None:
                return load_quantized(auto_class, name, quantize, **kwargs)
            return auto_class.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        if Path(name).is_dir():
            raise ModelNotFoundError(
                f"The folder '{name}' can't be loaded by {auto_class.__name__}: {str(error).splitlines()[0]}"
            ) from error
        offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
        why = "HF_HUB_OFFLINE is set, and it isn't in the cache" if offline else str(error).splitlines()[0]
        raise ModelNotFoundError(
            f"The model '{name}' can't be loaded: it isn't a local folder, and from the hub: {why}."
            " Give the path of a folder with config.json and model.safetensors, or a name from huggingface.co."
        ) from error


@contextmanager
def without_weights() -> Iterator[None]:
    """Within the block :func:`load_pretrained` reads a model's config alone, and fills it with whatever is there."""
    token = _WEIGHTLESS.set(True)
    try:
        yield
    finally:
        _WEIGHTLESS.reset(token)


_WEIGHTLESS = ContextVar("weightless", default=False)


def _from_config(auto_class: Any, name: str, quantize: Quantization | None, **kwargs: Any) -> Any:
    from transformers import AutoConfig

    model = auto_class.from_config(AutoConfig.from_pretrained(name, **kwargs))
    if quantize is not None:
        pack(find_base(model), quantize)
    return model


def named_outputs(names: Sequence[str]) -> dict[str, Any]:
    """The fields of a config by which a new head has an output for each of ``names``."""
    outputs = dict(enumerate(names))
    return {"num_labels": len(outputs), "id2label": outputs, "label2id": {name: i for i, name in outputs.items()}}


def load_classifier(name: str, quantize: Quantization | None = None, **head: Any) -> PreTrainedModel:
    """A pretrained model with a new linear head over a whole text.

    Args:
        name, quantize: as of :func:`load_pretrained`; so are errors.
        head: fields of its config: ``num_labels``, ``id2label``, ``problem_type``, ….
    """
    from transformers import AutoModelForSequenceClassification

    model = load_pretrained(AutoModelForSequenceClassification, name, quantize, **head)
    if model.config.pad_token_id is None:  # decoders find a row's last token by it
        model.config.pad_token_id = model.config.eos_token_id
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer; where it has no token for padding, it pads with the end of the text. Errors as of the model."""
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' report that the new head is new, and its progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
