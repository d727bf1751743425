"""Soft prompts: prompt tuning (Lester et al. 2021) and P-tuning (Liu et al. 2021).

n vectors P (n, d), trained, stand before the embedded tokens X (T, d) of a frozen model; nothing else changes:

    prompt tuning   [P; X]               https://arxiv.org/abs/2104.08691, section 2
    P-tuning        [f(E); X]            https://arxiv.org/abs/2103.10385, equation 4

where E (n, d) and the encoder f, an MLP or a bidirectional LSTM with one, are trained together. Once trained, f(E)
is a plain prompt, and as such it is saved.

The prompt goes in where the trunk embeds, and its positions come off the trunk's outputs again, so that heads,
labels, losses and pooling see the user's tokens and no others: [CLS] is still the first, and a language model learns to
continue the text alone (in PEFT the last virtual token predicts the first token too). Pads before a text stay before
the prompt, so that padding on either side counts for as little as in the bare model. With an encoder-decoder the prompt
stands before the encoder's input, and the decoder attends to it, as in the paper and in PEFT.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ft.callbacks.finetuning import AdapterDtype, FineTuning, check_choice, check_count
from lightning_ft.errors import UserError
from lightning_ft.injection import (
    Base,
    Injected,
    InjectionError,
    Layer,
    VirtualTokens,
    find_trunk,
    inject_layers,
)

PromptInit = Literal["SAMPLE_VOCAB", "RANDOM", "TEXT", "CLASS_NAMES"]
PromptEncoder = Literal["MLP", "LSTM"]

# ---------------------------------------------------------------------------------------------- the maths


class SoftPrompt(Injected):
    """A trunk that encodes ``[prompt; X]`` and gives what it made of X."""

    acts_on = "inputs"
    slot = "prompt_settings"

    prompt_settings: VirtualTokens
    config: Any
    pooler: Callable[[Tensor], Tensor]
    get_input_embeddings: Callable[[], nn.Embedding]

    def soft_prompt(self) -> Tensor:
        """The prompt: (virtual tokens, width)."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The trunk's own outputs, for the user's tokens.

        Of ``attentions`` the prompt's rows and columns are left out; what a row lacks of 1 went to the prompt. The
        cache, ``past_key_values``, holds the prompt too. An encoder with a decoder gives the prompt's states as well.

        Raises:
            ValueError: if prompt and tokens are more than the model has positions for; for a mask that isn't (batch,
                tokens), a static cache, or a cache that can't be told to hold the prompt.
        """
        trunk = self.prompt_settings.trunk
        inputs = trunk.bound(args, kwargs)
        return_dict = inputs.pop("return_dict", None)
        tokens = trunk.tokens(inputs).shape[1]
        own = self._put_prompt_in(inputs, tokens)
        out = super().forward(**inputs, return_dict=True)  # type: ignore[misc]
        if trunk.decoder is None:
            self._take_prompt_out(out, own, tokens)
        return out.to_tuple() if not (self.config.return_dict if return_dict is None else return_dict) else out

    def _put_prompt_in(self, inputs: dict[str, Any], tokens: int) -> Tensor:
        """Change what the trunk is called with.

        Returns:
            The places of the user's tokens, those in the cache too, in what it then sees: (batch or 1, all tokens).
        """
        n, trunk = self.prompt_settings.num_virtual_tokens, self.prompt_settings.trunk
        embeds = trunk.tokens(inputs)
        if inputs.pop("input_ids", None) is not None:
            embeds = self.get_input_embeddings()(embeds)
        past, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
        cached = past.get_seq_length() if past is not None else 0
        before = cached - n if cached else None
        seen = (before or 0) + tokens
        _check(inputs, tokens, before)
        trunk.check_length(seen, n)

        inputs["inputs_embeds"] = embeds
        if "position_ids" in trunk.arguments:
            inputs["position_ids"] = trunk.positions(inputs, tokens, before or 0, shift=n)
        pads = _padding_before(mask) if mask is not None else torch.zeros(1, 1, dtype=torch.long, device=embeds.device)
        if mask is not None:
            inputs["attention_mask"] = _with_ones(mask, n)
        if before is None:
            order = _behind_padding(pads, n, tokens)
            starts = {
                "inputs_embeds": self.soft_prompt().to(embeds.dtype),
                "position_ids": torch.arange(n, device=embeds.device) + trunk.first_position,
                "token_type_ids": torch.zeros(n, dtype=torch.long, device=embeds.device),
            }
            for key, start in starts.items():
                if inputs.get(key) is not None:
                    whole = torch.cat([start.expand(len(inputs[key]), *start.shape), inputs[key]], dim=1)
                    inputs[key] = _take(whole, order)
        at = torch.arange(seen, device=embeds.device)
        return torch.where(at < pads, at, at + n)

    def _take_prompt_out(self, out: Any, own: Tensor, tokens: int) -> None:
        def states(x: Tensor, dim: int = 1) -> Tensor:
            return x if x.shape[dim] == tokens else _take(x, own, dim)  # the prompt was there in the first pass alone

        def weights(x: Tensor) -> Tensor:
            forgotten = self.prompt_settings.num_virtual_tokens + own.shape[1] - x.shape[3]  # by a sliding window
            return states(_take(F.pad(x, (forgotten, 0)), own, 3), 2)

        out["last_hidden_state"] = states(out["last_hidden_state"])
        if out.get("hidden_states") is not None:
            out["hidden_states"] = tuple(h if h is None else states(h) for h in out["hidden_states"])
        if out.get("attentions") is not None:
            out["attentions"] = tuple(map(weights, out["attentions"]))
        if out.get("cross_attentions") is not None:
            out["cross_attentions"] = tuple(states(a, 2) for a in out["cross_attentions"])
        if out.get("pooler_output") is not None:
            out["pooler_output"] = self.pooler(out["last_hidden_state"])

    @classmethod
    def file_key(cls, prefix: str, path: str, name: str) -> str:  # noqa: ARG003
        """PEFT's name of the prompt, which stands alone."""
        return name


class PromptLayer(SoftPrompt):
    """Prompt tuning: the prompt itself is trained."""

    method = "PROMPT_TUNING"
    adds: ClassVar[Mapping[str, str]] = {"prompt_embeddings": "prompt_embeddings"}

    prompt_embeddings: nn.Parameter  # (virtual tokens, width)

    def soft_prompt(self) -> Tensor:
        """The prompt: (virtual tokens, width)."""
        return self.prompt_embeddings


def _mlp_adds(depth: int) -> dict[str, str]:
    # Of what computes the prompt PEFT's files hold nothing.
    return {f"prompt_mlp_{i}_{kind}": f"mlp_{i}_{kind}" for i in range(depth) for kind in ("weight", "bias")}


class MLPPrompt(SoftPrompt):
    """P-tuning: the prompt is what an MLP of three layers makes of its inputs, and both are trained."""

    method = "P_TUNING"
    prompt_encoder_type: ClassVar[PromptEncoder] = "MLP"
    prompt_mlp_depth: ClassVar[int] = 3
    adds: ClassVar[Mapping[str, str]] = {"prompt_inputs": "prompt_embeddings", **_mlp_adds(3)}

    prompt_inputs: nn.Parameter  # (virtual tokens, width)

    def soft_prompt(self) -> Tensor:
        """The prompt: (virtual tokens, width)."""
        return self.prompt_mlp(self.prompt_inputs)

    def prompt_mlp(self, x: Tensor) -> Tensor:
        """Linear layers with ReLU between them: (virtual tokens, in) to (virtual tokens, width)."""
        for i in range(self.prompt_mlp_depth):
            weight, bias = getattr(self, f"prompt_mlp_{i}_weight"), getattr(self, f"prompt_mlp_{i}_bias")
            x = F.linear(F.relu(x) if i else x, weight, bias)
        return x

    @property
    def prompt_encoder_size(self) -> int:
        """The encoder's width."""
        return self.prompt_settings.encoder_hidden_size or self.prompt_inputs.shape[1]

    @classmethod
    def start_prompt(cls, n: int, hidden: int | None, trunk: Any) -> dict[str, Tensor]:
        """Inputs and encoder as PEFT starts them."""
        width = trunk.get_input_embeddings().embedding_dim
        return {"prompt_inputs": torch.randn(n, width), **cls.start_prompt_encoder(width, hidden or width)}

    @classmethod
    def start_prompt_encoder(cls, width: int, hidden: int) -> dict[str, Tensor]:
        """The MLP."""
        return _start_mlp(width, hidden, hidden, width)

    @classmethod
    def in_files(cls, layer: Any) -> dict[str, Tensor]:
        """The prompt that was computed; how is of no more use."""
        return {"prompt_embeddings": layer.soft_prompt().detach()}


class LSTMPrompt(MLPPrompt):
    """P-tuning with a bidirectional LSTM of two layers, and an MLP of two after it."""

    prompt_encoder_type: ClassVar[PromptEncoder] = "LSTM"
    prompt_mlp_depth: ClassVar[int] = 2
    prompt_lstm: ClassVar[tuple[str, ...]] = tuple(
        f"prompt_lstm_{kind}_l{layer}{direction}"
        for layer in (0, 1)
        for direction in ("", "_reverse")
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    adds: ClassVar[Mapping[str, str]] = {
        "prompt_inputs": "prompt_embeddings",
        **{name: name.removeprefix("prompt_") for name in prompt_lstm},
        **_mlp_adds(2),
    }

    def soft_prompt(self) -> Tensor:
        """The prompt: (virtual tokens, width)."""
        before = self.prompt_inputs.new_zeros(4, 1, self.prompt_encoder_size)  # for each layer and direction
        weights = [getattr(self, name) for name in self.prompt_lstm]
        # With biases, 2 layers, no dropout, in training mode, bidirectional, batch first.
        states = torch.lstm(self.prompt_inputs[None], (before, before), weights, True, 2, 0.0, True, True, True)[0]
        return self.prompt_mlp(states[0])

    @classmethod
    def start_prompt_encoder(cls, width: int, hidden: int) -> dict[str, Tensor]:
        """The LSTM and the MLP."""
        lstm = nn.LSTM(width, hidden, num_layers=2, bidirectional=True).state_dict()
        return {**{f"prompt_lstm_{name}": p for name, p in lstm.items()}, **_start_mlp(2 * hidden, 2 * hidden, width)}


def _start_mlp(*sizes: int) -> dict[str, Tensor]:
    layers = [nn.Linear(n_in, n_out) for n_in, n_out in itertools.pairwise(sizes)]
    return {f"prompt_mlp_{i}_{kind}": p for i, layer in enumerate(layers) for kind, p in layer.state_dict().items()}


class PromptAttention(Injected):
    """A decoder that attends to the prompt too, which its encoder's outputs hold: its mask must cover it."""

    method = "PROMPT_TUNING"
    acts_on = "inputs"
    slot = "prompt_settings"
    adds: ClassVar[Mapping[str, str]] = {}

    prompt_settings: VirtualTokens

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's own outputs."""
        mask = kwargs.get("encoder_attention_mask")
        if mask is not None:
            kwargs["encoder_attention_mask"] = _with_ones(mask, self.prompt_settings.num_virtual_tokens)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class EncodedPromptAttention(PromptAttention):
    """The same, with P-tuning."""

    method = "P_TUNING"


def _padding_before(mask: Tensor) -> Tensor:
    """How many pads each row begins with: (batch, 1)."""
    return (mask.cumsum(-1) == 0).sum(-1, keepdim=True)


def _behind_padding(pads: Tensor, n: int, tokens: int) -> Tensor:
    """The places in [prompt; pads; text] of what is to be [pads; prompt; text]: (batch or 1, n + tokens)."""
    # A window, or biases by distance, would tell whether pads stand between the prompt and its text.
    at = torch.arange(n + tokens, device=pads.device)
    return torch.where(at < pads, at + n, torch.where(at < pads + n, at - pads, at))


def _take(x: Tensor, places: Tensor, dim: int = 1) -> Tensor:
    """What of each row of ``x`` stands along ``dim`` at its ``places`` (batch or 1, places)."""
    # As rows of one matrix: nothing of x is kept for that, and its gradient takes a tenth of take_along_dim's time.
    rows = x.movedim(dim, 1)
    flat = torch.arange(len(x), device=x.device)[:, None] * rows.shape[1] + places
    return rows.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, flat.shape).movedim(1, dim)


def _with_ones(mask: Tensor, n: int) -> Tensor:
    whole = torch.cat([mask.new_ones(len(mask), n), mask], dim=1)
    return _take(whole, _behind_padding(_padding_before(mask), n, mask.shape[1]))


def _check(inputs: Mapping[str, Any], tokens: int, before: int | None) -> None:
    """Refuse what would go wrong unsaid.

    Args:
        inputs: what the trunk is called with.
        tokens: how many tokens come in.
        before: how many of the user's the cache holds, with the prompt before them; None if it is empty.
    """
    mask, positions, past = (inputs.get(key) for key in ("attention_mask", "position_ids", "past_key_values"))
    if getattr(past, "is_compileable", False) or not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)):
        raise UserError(
            "A soft prompt goes with an attention_mask of (batch, tokens), and with the default, dynamic cache: a"
            " static one has its mask, of four dimensions, made for the tokens alone."
        )
    seen = tokens + (before or 0)
    told = mask.shape[1] if mask is not None else seen
    if before is not None and mask is None and positions is not None:
        told = int(positions.max()) + 1
    if told != seen:
        raise UserError(
            f"The mask or position ids are for {told} tokens, and with the cache there are {seen}. The cache holds the"
            " prompt too, so that generate() can't tell what of input_ids it has seen: start without one."
        )
    if mask is None and positions is not None and before is None and bool((positions.diff() <= 0).any()):
        raise UserError("The position ids tell of texts packed in a row; the prompt would go before the first.")
    if before is not None and mask is not None and bool((_padding_before(mask) > before).any()):
        raise UserError(
            "Of a row the cache holds padding alone, and the prompt behind it, where more padding comes: let the"
            " first pass reach the text (no prefill_chunk_size shorter than the padding), or pad on the right."
        )


# ----------------------------------------------------------------------------------------------- the start


def from_vocabulary(embedding: nn.Module, n: int) -> Tensor:
    """Embeddings of n random tokens: (n, width)."""
    return _rows(embedding, torch.randint(0, _size(embedding)[0], (n,)).tolist())


def random_rows(embedding: nn.Module, n: int) -> Tensor:
    """Normally distributed, as wide as the vocabulary's: (n, width)."""
    rows = from_vocabulary(embedding, 1000)
    return torch.normal(rows.mean().item(), rows.std().item(), (n, rows.shape[1]))


def from_text(embedding: nn.Module, n: int, tokenizer: Any, text: str) -> Tensor:
    """Embeddings of the text's tokens, repeated or cut to n: (n, width)."""
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise InjectionError(f"prompt_tuning_init_text={text!r} has no tokens.")
    return _rows(embedding, (ids * math.ceil(n / len(ids)))[:n])


def from_class_names(embedding: nn.Module, n: int, tokenizer: Any, names: Sequence[str]) -> Tensor:
    """The mean embedding of each name's tokens, then random tokens (Lester et al., section 3.1): (n, width)."""
    rows = []
    for name in names:
        ids = tokenizer(name, add_special_tokens=False)["input_ids"]
        if not ids:
            raise InjectionError(f"class_names: {name!r} has no tokens.")
        rows.append(_rows(embedding, ids).mean(dim=0, keepdim=True))
    return torch.cat([*rows, from_vocabulary(embedding, n - len(rows))])


def _rows(embedding: nn.Module, ids: Sequence[int]) -> Tensor:
    vocabulary, _ = _size(embedding)
    if ids and max(ids) >= vocabulary:
        raise InjectionError(
            f"The tokenizer has a token {max(ids)}, and the model embeds {vocabulary}: they don't belong together. Name"
            " the model's own: tokenizer_name_or_path=..."
        )
    device = next(embedding.parameters()).device
    rows: Tensor = embedding(torch.tensor(list(ids), dtype=torch.long, device=device))
    return rows.detach().float()


def _size(embedding: Any) -> tuple[int, int]:
    return embedding.num_embeddings, embedding.embedding_dim


def load_tokenizer(name: str | None) -> Any:
    """The tokenizer, by a folder's path or a name on the hub. None of its own code is executed.

    Raises:
        InjectionError: if it can't be loaded.
    """
    from transformers import AutoTokenizer

    try:
        if not name:
            raise ValueError("the model's config doesn't say where it came from (name_or_path)")
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InjectionError(
            f"The tokenizer {name or ''} for the prompt's first values can't be loaded: {str(error).splitlines()[0]}."
            ' Name a folder or a model: tokenizer_name_or_path="...".'
        ) from error


# --------------------------------------------------------------------------------------------- the callbacks


class PromptTuning(FineTuning):
    """Prompt tuning of a Hugging Face text model (Lester et al. 2021, https://arxiv.org/abs/2104.08691).

    Args:
        num_virtual_tokens: how many tokens the prompt has.
        prompt_tuning_init: how it starts: from random tokens' embeddings (``"SAMPLE_VOCAB"``), from random numbers
            (``"RANDOM"``), from a text (``"TEXT"``), or from the names of the classes, each the mean of its tokens'
            embeddings, and random tokens after them (``"CLASS_NAMES"``).
        prompt_tuning_init_text: the text; its tokens are repeated or cut to the prompt's length.
        class_names: the names; one by itself is a list of one.
        tokenizer_name_or_path: splits text and names into tokens; by default the model's own.
        modules_to_save, backbone, quantize, adapter_dtype: see :class:`~lightning_ft.callbacks.finetuning.FineTuning`.

    Raises:
        ValueError: for a value out of its range, or settings that don't go together.
        InjectionError: on injection, if the base isn't a Hugging Face text model, or the tokenizer can't be loaded.
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    plausible_lr: ClassVar[tuple[float, float]] = (1e-3, 1.0)
    layers: ClassVar[tuple[type[Injected], ...]] = (PromptLayer, PromptAttention)
    inside: ClassVar[str] = "base_model."

    def __init__(
        self,
        num_virtual_tokens: int = 20,
        prompt_tuning_init: PromptInit = "SAMPLE_VOCAB",
        prompt_tuning_init_text: str | None = None,
        class_names: str | Sequence[str] | None = None,
        tokenizer_name_or_path: str | None = None,
        modules_to_save: Sequence[str] | None = None,
        backbone: str | None = None,
        quantize: str | Mapping[str, Any] | None = None,
        adapter_dtype: AdapterDtype = "float32",
    ) -> None:
        super().__init__(modules_to_save, backbone, quantize, adapter_dtype=adapter_dtype)
        class_names = [class_names] if isinstance(class_names, str) else class_names
        check_count("PromptTuning: num_virtual_tokens", num_virtual_tokens)
        check_choice("PromptTuning: prompt_tuning_init", prompt_tuning_init, get_args(PromptInit))
        given = {"prompt_tuning_init_text": prompt_tuning_init_text, "class_names": class_names}
        wants = {"TEXT": "prompt_tuning_init_text", "CLASS_NAMES": "class_names"}
        for init, argument in wants.items():
            if bool(given[argument]) != (prompt_tuning_init == init):
                raise ValueError(f"PromptTuning: prompt_tuning_init={init!r} and {argument} go together.")
        if len(class_names or ()) > num_virtual_tokens:
            raise ValueError(
                f"PromptTuning: {len(class_names or ())} class_names don't fit into"
                f" num_virtual_tokens={num_virtual_tokens}."
            )
        self.num_virtual_tokens = num_virtual_tokens
        self.prompt_tuning_init: PromptInit = prompt_tuning_init
        self.prompt_tuning_init_text, self.class_names = prompt_tuning_init_text, class_names
        self.tokenizer_name_or_path = tokenizer_name_or_path

    def inject(self, model: nn.Module) -> list[str]:
        """Freeze the base and put the prompt before its input; see :meth:`FineTuning.inject`."""
        return inject_prompt(self, model, PromptLayer, PromptAttention, self.num_virtual_tokens, self._start)

    def _start(self, trunk: Any) -> dict[str, Tensor]:
        embedding, n, init = trunk.get_input_embeddings(), self.num_virtual_tokens, self.prompt_tuning_init
        if init == "SAMPLE_VOCAB":
            return {"prompt_embeddings": from_vocabulary(embedding, n)}
        if init == "RANDOM":
            return {"prompt_embeddings": random_rows(embedding, n)}
        tokenizer = load_tokenizer(self.tokenizer_name_or_path or trunk.config.name_or_path)
        if self.prompt_tuning_init_text is not None:
            return {"prompt_embeddings": from_text(embedding, n, tokenizer, self.prompt_tuning_init_text)}
        return {"prompt_embeddings": from_class_names(embedding, n, tokenizer, self.class_names or ())}

    # ---------------------------------------------------------------------------------- in PEFT's files

    @staticmethod
    def to_peft(layers: Mapping[str, Injected], base: Base) -> dict[str, Any]:  # noqa: ARG004
        """The fields of PEFT's ``adapter_config.json``."""
        return {**peft_fields(layers), "prompt_tuning_init": "RANDOM"}  # how it started matters no more

    @classmethod
    def from_peft(
        cls,
        config: Mapping[str, Any],
        targets: Sequence[str],  # noqa: ARG003
        modules_to_save: Sequence[str],
        backbone: str | None,
    ) -> PromptTuning:
        """The method that PEFT's ``config`` describes."""
        return cls(config["num_virtual_tokens"], "RANDOM", modules_to_save=modules_to_save, backbone=backbone)

    @classmethod
    def read_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's tensors, the prompt without the half that is never used: see :func:`first_prompt`."""
        return first_prompt(config, tensors)


class PTuning(FineTuning):
    """P-tuning of a Hugging Face text model (Liu et al. 2021, https://arxiv.org/abs/2103.10385).

    Saved, it is a plain prompt, and loads as :class:`PromptTuning`: what the encoder computes, without the encoder.

    Args:
        num_virtual_tokens: how many tokens the prompt has.
        encoder_reparameterization_type: what computes it: ``"MLP"`` of three layers, or ``"LSTM"``, bidirectional and
            of two layers, with an MLP of two after it.
        encoder_hidden_size: the encoder's width; by default the model's.
        modules_to_save, backbone, quantize, adapter_dtype: see :class:`~lightning_ft.callbacks.finetuning.FineTuning`.

    Raises:
        ValueError: for a value out of its range.
        InjectionError: on injection, if the base isn't a Hugging Face text model.
    """

    peft_type: ClassVar[str] = "P_TUNING"
    plausible_lr: ClassVar[tuple[float, float]] = (1e-4, 3e-2)
    layers: ClassVar[tuple[type[Injected], ...]] = (MLPPrompt, LSTMPrompt, EncodedPromptAttention)
    inside: ClassVar[str] = PromptTuning.inside

    def __init__(
        self,
        num_virtual_tokens: int = 20,
        encoder_reparameterization_type: PromptEncoder = "MLP",
        encoder_hidden_size: int | None = None,
        modules_to_save: Sequence[str] | None = None,
        backbone: str | None = None,
        quantize: str | Mapping[str, Any] | None = None,
        adapter_dtype: AdapterDtype = "float32",
    ) -> None:
        super().__init__(modules_to_save, backbone, quantize, adapter_dtype=adapter_dtype)
        check_count("PTuning: num_virtual_tokens", num_virtual_tokens)
        if encoder_hidden_size is not None:
            check_count("PTuning: encoder_hidden_size", encoder_hidden_size)
        known = get_args(PromptEncoder)
        check_choice("PTuning: encoder_reparameterization_type", encoder_reparameterization_type, known)
        self.num_virtual_tokens = num_virtual_tokens
        self.encoder_reparameterization_type: PromptEncoder = encoder_reparameterization_type
        self.encoder_hidden_size = encoder_hidden_size

    def inject(self, model: nn.Module) -> list[str]:
        """Freeze the base and put the prompt and its encoder before its input; see :meth:`FineTuning.inject`."""
        layer = MLPPrompt if self.encoder_reparameterization_type == "MLP" else LSTMPrompt
        n, hidden = self.num_virtual_tokens, self.encoder_hidden_size
        start = partial(layer.start_prompt, n, hidden)
        return inject_prompt(self, model, layer, EncodedPromptAttention, n, start, hidden)

    # ---------------------------------------------------------------------------------- in PEFT's files

    @staticmethod
    def to_peft(layers: Mapping[str, Injected], base: Base) -> dict[str, Any]:  # noqa: ARG004
        """The fields of PEFT's ``adapter_config.json``."""
        prompt = next(layer for layer in layers.values() if isinstance(layer, MLPPrompt))
        return {
            **peft_fields(layers),
            "encoder_reparameterization_type": prompt.prompt_encoder_type,
            "encoder_hidden_size": prompt.prompt_encoder_size,
        }

    @classmethod
    def from_peft(
        cls,
        config: Mapping[str, Any],
        targets: Sequence[str],
        modules_to_save: Sequence[str],
        backbone: str | None,
    ) -> PromptTuning:
        """The plain prompt that the files of P-tuning hold."""
        return PromptTuning.from_peft(config, targets, modules_to_save, backbone)

    @classmethod
    def read_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's tensors, the prompt without the half that is never used: see :func:`first_prompt`."""
        return first_prompt(config, tensors)


def inject_prompt(
    method: FineTuning,
    model: nn.Module,
    layer: type[SoftPrompt],
    attention: type[PromptAttention],
    num_virtual_tokens: int,
    start: Callable[[Any], Mapping[str, Tensor]],
    encoder_hidden_size: int | None = None,
) -> list[str]:
    """Freeze the base and attach ``layer`` to its trunk, and ``attention`` to a decoder that reads it.

    Args:
        method: the callback that asks.
        model: any module; needs no Trainer.
        layer: the prompt.
        attention: what goes onto the decoder of an encoder-decoder.
        num_virtual_tokens: the prompt's length.
        start: makes the first values of what ``layer`` adds, given the trunk.
        encoder_hidden_size: width of the encoder that computes the prompt, where one does.

    Returns:
        The paths that were touched.

    Raises:
        InjectionError: if the base isn't a Hugging Face text model, or pools in a way that isn't known.
    """
    name = type(method).__name__
    base, saved = method.prepare(model)
    trunk = find_trunk(base, name)
    module = base.root.get_submodule(trunk.name)
    if isinstance(getattr(module, "pooler", None), nn.Linear):
        raise InjectionError(
            f"{name}: {type(module).__name__} pools its first position by itself, which would be the prompt's. Build"
            " it with add_pooling_layer=False, or use another method."
        )
    settings = VirtualTokens(num_virtual_tokens, trunk, encoder_hidden_size)
    plan = {trunk.name: Layer(layer, settings, partial(start, module))}
    if trunk.decoder is not None:
        plan[trunk.decoder] = Layer(attention, settings, dict)
    return inject_layers(base, plan, name, saved, dtype=method.added_dtype)


def peft_fields(layers: Mapping[str, Injected]) -> dict[str, Any]:
    """What PEFT's config says of every prompt."""
    prompt = next(layer for layer in layers.values() if isinstance(layer, SoftPrompt))
    config = prompt.config.get_text_config()
    return {
        "num_virtual_tokens": prompt.prompt_settings.num_virtual_tokens,
        "token_dim": prompt.soft_prompt().shape[1],
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_transformer_submodules": 1,
    }


def first_prompt(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's tensors; for an encoder-decoder it makes a prompt twice as long, and uses the first half."""
    key = PromptLayer.adds["prompt_embeddings"]
    return {**tensors, key: tensors[key][: config["num_virtual_tokens"]]} if key in tensors else dict(tensors)
