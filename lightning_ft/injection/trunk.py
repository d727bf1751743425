"""The Hugging Face text model in a base, for methods that act on what goes into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.errors import UserError
from lightning_ft.injection.targets import Base, InjectionError, is_pretrained_model


@dataclass(frozen=True)
class Trunk:
    """What embeds tokens and encodes them: a model without its head, or either half of an encoder-decoder.

    Attributes:
        name: its path in the base's root.
        decoder: the path of the decoder that reads its outputs, where there is one.
        arguments: names of its forward's arguments, in order.
        first_position: the position id of the first token (RoBERTa and its like begin behind their padding id).
        max_positions: how many tokens it has positions for, if there is a limit.
    """

    name: str
    decoder: str | None
    arguments: tuple[str, ...]
    first_position: int
    max_positions: int | None

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a call of its forward, by name."""
        return {**dict(zip(self.arguments[: len(args)], args, strict=True)), **kwargs}

    def tokens(self, inputs: Mapping[str, Any]) -> Tensor:
        """What comes in: token ids (batch, tokens), or embedded tokens (batch, tokens, width).

        Raises:
            ValueError: if it is both or neither.
        """
        given = [inputs[key] for key in ("input_ids", "inputs_embeds") if inputs.get(key) is not None]
        if len(given) != 1:
            raise UserError("Give either input_ids or inputs_embeds.")
        tokens: Tensor = given[0]
        return tokens

    def positions(self, inputs: Mapping[str, Any], tokens: int, seen: int, shift: int) -> Tensor:
        """The position ids (batch or 1, tokens) of the last ``tokens``, ``shift`` further on than they were.

        Taken from the mask where none are given, so that padding counts for nothing on whichever side it is.

        Args:
            inputs: what forward was called with; its ``attention_mask`` covers what the cache holds too.
            tokens: how many tokens come in.
            seen: how many went before, into the cache.
            shift: by how much to move them.
        """
        given, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        if given is not None:
            return given + shift
        if mask is not None and mask.ndim == 2:
            counted = mask.long().cumsum(-1)[:, -tokens:] - 1
        else:
            counted = torch.arange(seen, seen + tokens, device=self.tokens(inputs).device)[None]
        return self.first_position + shift + counted

    def check_length(self, tokens: int, added: int) -> None:
        """Raise ValueError if ``tokens`` and ``added`` before them are more than it has positions for."""
        if self.max_positions is not None and tokens + added > self.max_positions:
            raise UserError(
                f"{tokens} tokens and {added} virtual tokens before them are {tokens + added}, and the model has"
                f" positions for {self.max_positions}. Truncate texts to {self.max_positions - added} tokens, or use"
                " fewer virtual tokens."
            )


@dataclass(frozen=True)
class VirtualTokens:
    """How many virtual tokens a trunk has before those of its users, and what of it their layer needs to know."""

    num_virtual_tokens: int
    trunk: Trunk
    encoder_hidden_size: int | None = None

    def __str__(self) -> str:
        width = "" if self.encoder_hidden_size is None else f", encoder_hidden_size={self.encoder_hidden_size}"
        return f"(num_virtual_tokens={self.num_virtual_tokens}{width})"


def find_trunk(base: Base, method: str) -> Trunk:
    """The text model in ``base`` that ``method`` is to act on the inputs of; of an encoder-decoder the encoder.

    Raises:
        InjectionError: if there is none.
    """
    trunk: Any = getattr(base.root, "base_model", base.root) if is_pretrained_model(base.root) else base.root
    encoder, decoder = (getattr(trunk, part, None) for part in ("encoder", "decoder"))
    # The encoder of an encoder-decoder, or what is left of one (T5EncoderModel), or a decoder by itself (OPT), which
    # heads call past what is around it; BERT's own encoder is but a stack of layers.
    inner: Any = decoder if encoder is None else encoder
    part: Any = inner if inner is not None and is_pretrained_model(inner) else trunk
    if not is_pretrained_model(part) or "inputs_embeds" not in _arguments(part):
        raise InjectionError(
            f"{method} acts on the embedded tokens that go into a Hugging Face text model, and"
            f" {type(part).__name__} isn't one. Name the text model (backbone=...), or use another method."
        )
    names: dict[Any, str] = {module: name for name, module in base.root.named_modules()}
    reads = names.get(getattr(decoder, "base_model", decoder)) if part is encoder else None
    return trunk_at(base, names[part], reads)


def trunk_at(base: Base, name: str, decoder: str | None = None) -> Trunk:
    """The text model at ``name`` in ``base``, which the one at ``decoder`` reads."""
    part: Any = base.root.get_submodule(name)
    embeddings = getattr(part, "embeddings", None)
    behind_padding = hasattr(embeddings, "create_position_ids_from_inputs_embeds")
    first = embeddings.padding_idx + 1 if behind_padding else 0  # type: ignore[union-attr]
    limit = getattr(part.config.get_text_config(), "max_position_embeddings", None)
    return Trunk(name, decoder, _arguments(part), first, limit and limit - first)


def _arguments(part: nn.Module) -> tuple[str, ...]:
    original: Any = getattr(part, "_original", type(part))
    return tuple(signature(original.forward).parameters)[1:]
