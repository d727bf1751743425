"""General text, and what a model makes of it: how it is told what of the base's ability is left.

A causal language model gives text a probability. Whatever else there is (encoders under a new head, masked language
models, encoder-decoders) gives a text an embedding: the mean of the last hidden states of its tokens, of unit length,
in an encoder-decoder the encoder's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ft.errors import UserError

GENERAL_EN = "bundled:general_en"
"""200 English sentences on twenty subjects, written for this project."""

_BUNDLED = Path(__file__).parent / "data" / "bundled"
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # what a trunk takes of a batch


class GeneralTextError(UserError):
    """General text can't be read, or there's nothing to read it with."""


def read_texts(texts: str | Path | Sequence[str]) -> list[str]:
    """General text: a list, or a file with one text a line, or one that comes with the package (``bundled:NAME``).

    Raises:
        GeneralTextError: if there's no such file, it's a table or isn't UTF-8, or there's no text in it.
    """
    if not isinstance(texts, (str, Path)):
        found = [str(text) for text in texts if str(text).strip()]
        if not found:
            raise GeneralTextError("The list of general texts is empty.")
        return found
    file = Path(texts).expanduser()
    if str(texts).startswith("bundled:"):
        file = _BUNDLED / f"{str(texts).removeprefix('bundled:')}.txt"
    if not file.is_file():
        there = ", ".join(sorted(f"bundled:{path.stem}" for path in _BUNDLED.glob("*.txt")))
        raise GeneralTextError(f"There is no file of general text '{texts}'. Give one with a text a line, or {there}.")
    if file.suffix.lower() in _TABLES:
        raise GeneralTextError(f"'{file}' is a table: general text is a file with one text a line, or a list of texts.")
    try:
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise GeneralTextError(f"'{file}' isn't UTF-8: {error.reason} in line {line}.") from error
    if not found:
        raise GeneralTextError(f"'{file}' holds no text.")
    return found


def encode(texts: Sequence[str], model: Any, tokenizer: str | None, max_length: int) -> list[dict[str, list[int]]]:
    """The model's inputs for each text, cut to ``max_length`` tokens.

    Args:
        texts: what is read.
        model: a Hugging Face model, whose own tokenizer it is unless one is named.
        tokenizer: a folder or a name on the hub.
        max_length: in tokens; what the tokenizer says that the model reads, if that is less.

    Raises:
        GeneralTextError: if the tokenizer can't be had.
    """
    from transformers import AutoTokenizer

    name = tokenizer or getattr(model, "name_or_path", "")
    try:
        reader = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise GeneralTextError(
            f"The model's tokenizer can't be loaded from '{name}' to read general text. Name it: tokenizer=FOLDER, or"
            " a name on the hub."
        ) from error
    rows = reader(list(texts), truncation=True, max_length=min(max_length, reader.model_max_length))
    taken = [key for key in _INPUTS if key in rows and key in signature(model.forward).parameters]
    return [{key: rows[key][i] for key in taken} for i in range(len(texts))]


def collate(rows: Sequence[Mapping[str, list[int]]], device: torch.device) -> dict[str, Tensor]:
    """Rows as a batch of (rows, tokens), filled up on the right with what no mask shows."""
    longest = max(len(row["input_ids"]) for row in rows)
    return {
        key: torch.tensor([row[key] + [0] * (longest - len(row[key])) for row in rows], device=device)
        for key in rows[0]
    }


def is_causal_lm(model: nn.Module) -> bool:
    """Whether it gives text a probability, token by token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def trunk_of(model: Any) -> nn.Module:
    """What gives hidden states: the model below its head, of an encoder-decoder the encoder."""
    trunk = getattr(model, "base_model", model)
    return trunk.get_encoder() if getattr(trunk.config, "is_encoder_decoder", False) else trunk


def hidden_states(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The last hidden states of the trunk: (rows, tokens, width)."""
    taken = {key: inputs[key] for key in _INPUTS if key in inputs}
    return trunk_of(model)(**taken).last_hidden_state


def embed(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the tokens, of unit length: (rows, tokens, width) and (rows, tokens) to (rows, width), in fp32.

    Args:
        hidden: last hidden states.
        mask: 0 where there's no token; None where all are.
    """
    hidden = hidden.float() if hidden.dtype.itemsize < 4 else hidden
    if mask is None:
        return F.normalize(hidden.mean(dim=1), dim=-1)
    return F.normalize((hidden * mask[..., None]).sum(dim=1), dim=-1)  # the length is made one anyway


def token_losses(logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """``-log p`` of each token given those before it: (tokens of the batch,), in fp32."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    real = mask[:, 1:] & mask[:, :-1]
    return F.cross_entropy(logits[:, :-1][real].float(), ids[:, 1:][real], reduction="none")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block every module evaluates and no gradient is kept; afterwards each has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def embeddings(model: nn.Module, rows: Sequence[Mapping[str, list[int]]], batch_size: int = 32) -> Tensor:
    """Of each text: (texts, width), on the CPU."""
    with evaluating(model):
        batches = _batches(model, rows, batch_size)
        return torch.cat([embed(hidden_states(model, b), b.get("attention_mask")).cpu() for b in batches])


def perplexity(model: nn.Module, rows: Sequence[Mapping[str, list[int]]], batch_size: int = 32) -> float:
    """The exponential of the mean of ``-log p`` over all tokens but each text's first."""
    with evaluating(model):
        losses = [token_losses(model(**b).logits, b).cpu() for b in _batches(model, rows, batch_size)]
    return float(torch.cat(losses).double().mean().exp())


def _batches(model: nn.Module, rows: Sequence[Mapping[str, list[int]]], batch_size: int) -> Iterator[dict[str, Tensor]]:
    device = next(model.parameters()).device
    return (collate(rows[i : i + batch_size], device) for i in range(0, len(rows), batch_size))


def neighbours(embedded: Tensor, k: int) -> Tensor:
    """The k nearest of the others for each text, by cosine: (texts, width) to indices (texts, k)."""
    near = embedded @ embedded.T
    near.fill_diagonal_(-torch.inf)
    return near.topk(k, dim=1).indices


def agreement(before: Tensor, after: Tensor) -> float:
    """The share of neighbours, (texts, k) each, that stayed; 1 where nothing changed."""
    stayed = (before[:, :, None] == after[:, None, :]).any(dim=2)
    return float(stayed.double().mean())


@dataclass
class Seen:
    """What of a forward pass was seen on its way: the trunk's last hidden states, the model's logits."""

    hidden: Tensor | None = None
    logits: Tensor | None = None


@contextmanager
def watching(model: nn.Module) -> Iterator[Seen]:
    """Keep, with their gradients, the hidden states and the logits of the forward pass in the block."""
    seen = Seen()

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.hidden = getattr(output, "last_hidden_state", seen.hidden)
        seen.logits = getattr(output, "logits", seen.logits)

    handles = [module.register_forward_hook(keep) for module in dict.fromkeys((model, trunk_of(model)))]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
