"""Language models: CausalLM, which goes on with a text, and Seq2SeqLM, which answers one text with another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchmetrics import MeanMetric, MetricCollection

from lightning_ft.errors import UserError
from lightning_ft.injection import is_whole
from lightning_ft.ops import linear_cross_entropy
from lightning_ft.tasks.pretrained import load_pretrained, load_tokenizer
from lightning_ft.tasks.task import Batch, Table, Task, inputs_and_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lightning_ft.quantization import Quantization

IGNORED = -100
"""The label of a token that isn't to be learned."""

COMPARED = 2**22
"""At most so many probabilities of a batch are kept when two models are compared: 16 MiB."""


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token that is to be learned, -log p(token | what is before it), and whether it's the likeliest; in fp32.

    Args:
        logits: (batch, tokens, vocabulary).
        labels: (batch, tokens), those of the same place in ``logits``; IGNORED where nothing is to be learned.

    Returns:
        Two tensors (learned tokens,).
    """
    learned = labels != IGNORED
    logits, labels = logits[learned].float(), labels[learned]  # of the others fp32 would only cost memory
    return F.cross_entropy(logits, labels, reduction="none"), (logits.argmax(dim=-1) == labels).float()


class _Tap:
    """A forward pre-hook of a head that keeps what the head is given, and gives it that of one token alone."""

    hidden: Tensor
    """(batch, tokens, width)."""

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        self.hidden = args[0]
        return (self.hidden[0, :1][None],)  # strides of a matrix: else W would be copied, for each row once


class _Places:
    """Where a mask is True, in a vector of it: counted while a GPU does other things, so that none waits for it."""

    def __init__(self, mask: Tensor) -> None:
        self._in_order = mask.flatten().to(torch.uint8).argsort(descending=True, stable=True)
        self._count = mask.sum().to("cpu", non_blocking=True)
        self._counted = torch.cuda.Event() if mask.is_cuda else None
        if self._counted is not None:
            self._counted.record()

    def found(self) -> Tensor:
        """(k,), ascending."""
        if self._counted is not None:
            self._counted.synchronize()
        return self._in_order[: int(self._count)]


@contextmanager
def _tapped(head: nn.Linear) -> Iterator[_Tap]:
    tap = _Tap()
    handle = head.register_forward_pre_hook(tap)
    try:
        yield tap
    finally:
        handle.remove()


def plain_head(model: Any) -> nn.Linear | None:
    """The linear layer that makes logits of hidden states; None if it's another kind, or not whole on this device.

    FSDP2 makes it whole for what the model itself computes alone.
    """
    head = None if isinstance(model, FSDPModule) else model.get_output_embeddings()
    return head if type(head) is nn.Linear and is_whole(head.weight) else None


class Example(NamedTuple):
    """What a model is to go on with, and what it should say; token ids."""

    prompt: list[int]
    reference: list[int]


@dataclass
class _Seen:
    """What was seen of an evaluation, to generate from when it ends."""

    model: nn.Module
    examples: list[Example] = field(default_factory=list)
    widest: int = 0
    table: Table | None = None


class LanguageTask(Task):
    """What both kinds of language models have in common: the loss of tokens, perplexity, and generated texts.

    The loss is the mean over all tokens of a batch that are to be learned. Of accumulated batches each counts alike,
    however many tokens it has. Perplexity is exp of the mean over all tokens of an evaluation.

    Args:
        tokenizer: the model's, or its folder or name on the hub.
        max_new_tokens: at most so many tokens are generated of a text.
        generations: how many rows of a validation and of a test are shown with what the model generates for them.
        stop: more tokens that end a text, besides the tokenizer's and the model's own (``["<|im_end|>"]``).
        sampling: more arguments of transformers' ``generate``, e.g. ``{"do_sample": True, "top_p": 0.9}``; by default
            the likeliest token is taken.

    Raises:
        ValueError: for a number out of its range.
    """

    new_head = False
    tables_after = ("val", "test")
    shift: ClassVar[int]
    """How many places behind the logits of a token its label is."""
    _plain_logits: bool | None = None
    """Whether the logits were seen to be what the head says and nothing else; None: not yet looked."""

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        max_new_tokens: int = 64,
        generations: int = 4,
        stop: Sequence[str] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("generations", generations, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        self._tokenizer = tokenizer
        self.max_new_tokens, self.generations = max_new_tokens, generations
        self.stop, self.sampling = list(stop or ()), dict(sampling or {})
        self.metrics = nn.ModuleDict({stage: _metrics() for stage in ("val", "test")})
        self._seen: dict[str, _Seen] = {}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; where it has no token for padding, it pads with the end of the text."""
        return load_tokenizer(self._tokenizer) if isinstance(self._tokenizer, str) else self._tokenizer

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of tokens to be learned: logits (batch, tokens, vocabulary), labels (batch, tokens)."""
        losses, _ = token_losses(*self.aligned(outputs, labels))
        return losses.sum() / max(len(losses), 1)

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The same without the logits: most of the memory of a step, and those of a prompt aren't needed at all.

        The head is run for one token alone, where it's seen that the model makes nothing more of what it says (some
        scale it, or cap it); if it does, the loss is taken from the logits.
        """
        head = plain_head(model)
        if head is None or self._plain_logits is False:
            return super().training_loss(model, batch)
        inputs, labels = inputs_and_labels(batch)
        self.prepare(model, inputs)
        if self._plain_logits is None:
            self._plain_logits = self._are_logits_plain(model, head, inputs)
            return self.training_loss(model, batch)
        places = _Places(labels[:, self.shift :] != IGNORED)
        with _tapped(head) as tap:
            self.outputs(model, inputs)
        learned = places.found()
        hidden, labels = (tensor.flatten(0, 1)[learned] for tensor in self.aligned(tap.hidden, labels))
        return linear_cross_entropy(hidden, head.weight, labels, head.bias) / max(len(learned), 1)

    def _are_logits_plain(self, model: nn.Module, head: nn.Linear, inputs: Batch) -> bool:
        device = head.weight.device
        drawn_on = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(drawn_on), _tapped(head) as tap:
            logits = self.outputs(model, {key: value[:1] for key, value in inputs.items()})
            return torch.equal(logits.float(), head(tap.hidden).float())

    def prepare(self, model: nn.Module, inputs: Batch) -> None:
        """See that the model can be given such a batch."""

    def count(self, labels: Tensor) -> int:
        """How many tokens are to be learned."""
        return max(1, int((labels[:, self.shift :] != IGNORED).sum()))

    def update(self, stage: str, outputs: Tensor, labels: Tensor) -> None:
        """Count a batch in the metrics of ``stage``, token by token."""
        losses, hits = token_losses(*self.aligned(outputs, labels))
        self._metric(stage, "perplexity").update(losses)
        self._metric(stage, "token_accuracy").update(hits)

    def scores(self, stage: str) -> dict[str, Tensor]:
        """Perplexity and accuracy by the token of ``stage`` since the last reset."""
        means = self._of(stage).compute()
        return {**means, "perplexity": means["perplexity"].exp()}

    def reset(self, stage: str) -> None:
        """Begin counting anew."""
        self._of(stage).reset()
        self._seen.pop(stage, None)

    def observe(self, stage: str, model: nn.Module, batch: Batch) -> None:
        """Keep some rows to generate from: of the first batch as many as are shown, of each later one another."""
        if not self.generations or isinstance(model, FSDPModule):  # texts end at different steps in its processes
            return
        seen = self._seen.setdefault(stage, _Seen(model))
        rows, wanted = len(batch["labels"]), 1 if seen.examples else self.generations
        seen.examples += self.examples(batch, _spread(rows, wanted))
        seen.widest = max(seen.widest, batch["input_ids"].shape[1])

    def tables(self, stage: str) -> dict[str, Table]:
        """``generations``: of some rows the prompt, what the model makes of it, and what it should."""
        seen = self._seen.get(stage)
        if seen is None:
            return {}
        if seen.table is None:
            chosen = [seen.examples[i] for i in _spread(len(seen.examples), self.generations)]
            said = [self.generated(seen.model, [e.prompt], self.room(e, seen.widest))[0] for e in chosen]
            rows = [[self.text(e.prompt), text, self.text(e.reference)] for e, text in zip(chosen, said, strict=True)]
            seen.table = (["prompt", "generated", "reference"], rows)
        return {"generations": seen.table}

    def values(self, outputs: Tensor) -> Tensor:
        """Probabilities of all tokens (rows, places, vocabulary), at places spread evenly over the batch's width."""
        rows, tokens, vocabulary = outputs.shape
        places = _spread(tokens, max(1, COMPARED // (rows * vocabulary)))
        return outputs[:, places].float().softmax(dim=-1)

    def aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels of the same tokens, at the same places."""
        return logits[:, : logits.shape[1] - self.shift], labels[:, self.shift :]

    def text(self, ids: Sequence[int]) -> str:
        """Token ids as a text, without special tokens and white space around it."""
        return str(self.tokenizer.decode([i for i in ids if i != IGNORED], skip_special_tokens=True)).strip()

    @abstractmethod
    def examples(self, batch: Batch, rows: Sequence[int]) -> list[Example]:
        """These rows of a batch, taken apart."""

    @abstractmethod
    def generated(self, model: Any, prompts: Sequence[Sequence[int]], most: int) -> list[str]:
        """What the model makes of prompts, in at most ``most`` tokens each."""

    def room(self, example: Example, widest: int) -> int:
        """How many tokens may be generated of an example; ``widest`` is how long rows are at most."""
        return self.max_new_tokens

    def _generate(self, model: Any, prompts: Sequence[Sequence[int]], left: bool, most: int) -> Tensor:
        """All tokens that ``generate`` gives for prompts, which are padded to one length."""
        longest, pad = max(map(len, prompts)), self.tokenizer.pad_token_id or 0

        def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
            pads = [[fill] * (longest - len(row)) for row in rows]
            whole = [[*p, *row] if left else [*row, *p] for p, row in zip(pads, rows, strict=True)]
            return torch.tensor(whole, device=model.device)

        given: dict[str, Any] = {"do_sample": False, **self.sampling}
        return model.generate(
            input_ids=padded(prompts, pad),
            attention_mask=padded([[1] * len(prompt) for prompt in prompts], 0),
            max_new_tokens=most,
            pad_token_id=pad,
            eos_token_id=self.ends(model),
            **given,
        )

    def ends(self, model: Any) -> list[int] | None:
        """The tokens that end a generated text; UserError if ``stop`` names none of the tokenizer's."""
        vocabulary = self.tokenizer.get_vocab()
        unknown = [token for token in self.stop if token not in vocabulary]
        if unknown:
            raise UserError(f"stop={self.stop}: the tokenizer has no token {', '.join(map(repr, unknown))}.")
        own = model.generation_config.eos_token_id
        own = own if isinstance(own, list) else [own]
        ends = [*own, self.tokenizer.eos_token_id, *(vocabulary[token] for token in self.stop)]
        return sorted({int(end) for end in ends if end is not None}) or None

    def _of(self, stage: str) -> MetricCollection:
        collection = self.metrics[stage]
        assert isinstance(collection, MetricCollection)
        return collection

    def _metric(self, stage: str, name: str) -> MeanMetric:
        metric = self._of(stage)[name]
        assert isinstance(metric, MeanMetric)
        return metric


class CausalLM(LanguageTask):
    """A decoder with its own pretrained head goes on with texts.

    A batch has ``input_ids`` and ``labels`` (batch, tokens) alike but where a label is IGNORED; whether it's a
    completion, a chat or a whole text that is learned is said by them alone. A batch with ``position_ids`` and without
    ``attention_mask`` is packed: several examples a row, each with places of its own from 0 on.

    Args: see :class:`LanguageTask`.
    """

    shift = 1
    _packs = False
    """Whether the model was seen to keep packed examples apart."""

    def build(self, name: str, quantize: Quantization | None = None) -> PreTrainedModel:
        """The pretrained model as it is; errors as of :func:`load_pretrained`.

        Raises:
            UserError: if it's an encoder, which sees what it should say.
        """
        from transformers import AutoModelForCausalLM

        model = load_pretrained(AutoModelForCausalLM, name, quantize)
        if not getattr(model.config, "is_decoder", True):
            raise UserError(
                f"'{name}' is an encoder ({type(model).__name__}), whose tokens see those behind them: it can't go on"
                " with a text. Name a language model: model=hub model.name=FOLDER_OR_HUB_NAME."
            )
        self.ends(model)
        return model

    def prepare(self, model: nn.Module, inputs: Batch) -> None:
        """See that the model keeps the examples of a packed batch's rows apart; UserError if it doesn't."""
        if _is_packed(inputs) and not self._packs:
            check_packing(model, inputs["input_ids"])
            self._packs = True

    def outputs(self, model: nn.Module, inputs: Batch) -> Tensor:
        """The logits (batch, tokens, vocabulary); UserError as of :meth:`prepare`."""
        if not _is_packed(inputs):
            return model(**inputs).logits
        self.prepare(model, inputs)
        # transformers tells the examples of a row by their position ids, but not where there is a cache.
        return model(**inputs, use_cache=False).logits

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """For each row the completion of its prompt; of rows with labels, that of what is before the last of them."""
        if batch.get("labels") is not None:
            prompts = [example.prompt for example in self.examples(batch, range(len(batch["labels"])))]
        else:
            prompts = [
                ids[shown.bool()].tolist()
                for ids, shown in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
        return [{"completion": text} for text in self.generated(model, prompts, self.max_new_tokens)]

    def generated(self, model: Any, prompts: Sequence[Sequence[int]], most: int) -> list[str]:
        """The completions; prompts are padded on the left, so that each ends where its completion begins."""
        places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if places is not None:
            most = max(1, min(most, places - max(map(len, prompts))))
        tokens = self._generate(model, prompts, True, most)
        return [self.text(row) for row in tokens[:, max(map(len, prompts)) :].tolist()]

    def room(self, example: Example, widest: int) -> int:
        """No more than makes the example as long as the longest row was: there's room for that, and virtual tokens."""
        return max(1, min(self.max_new_tokens, widest - len(example.prompt)))

    def examples(self, batch: Batch, rows: Sequence[int]) -> list[Example]:
        """Cut before the last run of tokens that are learned; a text that is learned whole, in the middle."""
        shown = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        return [
            _cut(batch["input_ids"][i][shown[i]].tolist(), (batch["labels"][i] != IGNORED)[shown[i]].tolist())
            for i in rows
        ]


class Seq2SeqLM(LanguageTask):
    """An encoder-decoder with its own pretrained head answers a source text with a target text.

    A batch has the source's ``input_ids`` and ``attention_mask``, and the target's tokens twice: as ``labels``, and as
    ``targets``, of which the model makes what the decoder is given.

    Args:
        exact_match: whether a test also generates for every row, and tells the share of those that match.
        tokenizer, max_new_tokens, generations, stop, sampling: see :class:`LanguageTask`.
    """

    shift = 0

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        max_new_tokens: int = 64,
        generations: int = 4,
        exact_match: bool = False,
        stop: Sequence[str] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tokenizer, max_new_tokens, generations, stop, sampling)
        self.exact_match = exact_match
        if exact_match:
            self._of("test").add_metrics({"exact_match": MeanMetric(nan_strategy="disable")})

    def build(self, name: str, quantize: Quantization | None = None) -> PreTrainedModel:
        """The pretrained model as it is; errors as of :func:`load_pretrained`."""
        from transformers import AutoModelForSeq2SeqLM

        model = load_pretrained(AutoModelForSeq2SeqLM, name, quantize)
        self.ends(model)
        return model

    def outputs(self, model: Any, inputs: Batch) -> Tensor:
        """The logits (batch, target's tokens, vocabulary) of a decoder that is given the targets, one place late."""
        given = {key: value for key, value in inputs.items() if key != "targets"}
        before = model.prepare_decoder_input_ids_from_labels(inputs["targets"])
        return model(**given, decoder_input_ids=before).logits

    def observe(self, stage: str, model: nn.Module, batch: Batch) -> None:
        """Also generate for every row of a test, where that is asked for."""
        super().observe(stage, model, batch)
        if stage == "test" and self.exact_match:
            examples = self.examples(batch, range(len(batch["labels"])))
            said = self.generated(model, [e.prompt for e in examples], self.max_new_tokens)
            hits = [float(text == self.text(e.reference)) for text, e in zip(said, examples, strict=True)]
            self._metric(stage, "exact_match").update(torch.tensor(hits, device=batch["labels"].device))

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """For each row the target text."""
        inputs, _ = inputs_and_labels(batch)
        prompts = _sources(inputs, range(len(inputs["input_ids"])))
        return [{"completion": text} for text in self.generated(model, prompts, self.max_new_tokens)]

    def generated(self, model: Any, prompts: Sequence[Sequence[int]], most: int) -> list[str]:
        """The target texts of sources."""
        return [self.text(row) for row in self._generate(model, prompts, False, most).tolist()]

    def examples(self, batch: Batch, rows: Sequence[int]) -> list[Example]:
        """Source and target."""
        return [
            Example(source, [i for i in batch["labels"][row].tolist() if i != IGNORED])
            for row, source in zip(rows, _sources(batch, rows), strict=True)
        ]


def check_packing(model: nn.Module, like: Tensor) -> None:
    """Raise UserError unless the model sees the second of two packed examples as if it were alone.

    Whether it does depends on the architecture, on how attention is implemented, and on what was injected: asked, and
    not looked up.

    Args:
        model: a causal language model.
        like: token ids (batch, tokens) of at least 4 tokens, to try it with.
    """
    ids = like[:1, :8]
    first = ids.shape[1] // 2
    alone = torch.arange(ids.shape[1] - first, device=ids.device)[None]
    packed = torch.cat([torch.arange(first, device=ids.device)[None], alone], dim=1)
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False  # not .eval(), which a method may hold
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            expected = model(input_ids=ids[:, first:], position_ids=alone, use_cache=False).logits
            found = model(input_ids=ids, position_ids=packed, use_cache=False).logits[:, first:]
    except TypeError as error:
        raise UserError(f"{type(model).__name__} can't be given packed examples: {error}. Train it without.") from error
    finally:
        for module, training in modes:
            module.training = training
    tolerance = torch.finfo(found.dtype).eps ** 0.5 * float(expected.abs().max())
    if not torch.allclose(found, expected, atol=tolerance, rtol=0):
        raise UserError(
            f"Packed examples would see each other, or not what each sees alone, in {type(model).__name__}: packing"
            " needs a model that tells them by position_ids, and no virtual tokens before them. Train it without:"
            " data.target.packing=false."
        )


def _is_packed(inputs: Batch) -> bool:
    return "position_ids" in inputs and "attention_mask" not in inputs


def _metrics() -> MetricCollection:
    means = {name: MeanMetric(nan_strategy="disable") for name in ("perplexity", "token_accuracy")}
    return MetricCollection(means, compute_groups=False)  # type: ignore[arg-type]


def _cut(ids: list[int], learned: list[bool]) -> Example:
    end = max((i + 1 for i, yes in enumerate(learned) if yes), default=len(ids))
    begin = end
    while begin and learned[begin - 1]:
        begin -= 1
    if begin <= 1:  # nothing but the first token, which nothing is before
        begin = max(1, end // 2)
    return Example(ids[:begin], ids[begin:end])


def _sources(inputs: Batch, rows: Sequence[int]) -> list[list[int]]:
    shown = inputs["attention_mask"].bool()
    return [inputs["input_ids"][i][shown[i]].tolist() for i in rows]


def _spread(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of ``count`` places, evenly: the middles of as many parts."""
    wanted = min(wanted, count)
    return [count * (2 * i + 1) // (2 * wanted) for i in range(wanted)]
