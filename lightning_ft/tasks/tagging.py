"""A tag for each word of a text, by which entities are found."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_ft.reporting import confusion_matrix
from lightning_ft.tasks.pretrained import load_pretrained, named_outputs
from lightning_ft.tasks.task import Batch, Table, Task, inputs_and_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

    from lightning_ft.quantization import Quantization

Labels = Mapping[str, Any]


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The entities that tags say, in their order: type, first word, and the word behind the last one.

    ``B-TYPE`` begins an entity, ``I-TYPE`` goes on with one (Ramshaw & Marcus 1995,
    https://aclanthology.org/W95-0107). An ``I-`` that goes on with none of its type begins one: so counts
    ``conlleval``, the script of CoNLL-2003 (Tjong Kim Sang & De Meulder, https://aclanthology.org/W03-0419), and
    seqeval by default. A plain tag other than ``O`` is read as an ``I-``: a run of equal ones is an entity.
    """
    found: list[tuple[str, int, int]] = []
    start, kind = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        begins, name = _parts(tag)
        if kind and (begins or name != kind):
            found.append((kind, start, i))
        if name and (begins or name != kind):
            start = i
        kind = name
    return found


class EntityCounts(Metric):
    """What is counted of tags: entities as a whole, words by the type of their entity, and words by their tag.

    An entity is right if its type, its first and its last word are. With right, predicted and true ones counted over
    all texts and types, precision is right / predicted, recall right / true, and
    F1 = 2 · precision · recall / (precision + recall); each is 0 where it would be 0 / 0.

    Args:
        labels: the tags, in the order of their ids.
    """

    full_state_update = False
    entities: Tensor
    words: Tensor
    right: Tensor
    unread: Tensor

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__()
        self.labels = list(labels)
        self.types = sorted({name for _, name in map(_parts, labels) if name})
        n = len(self.types)
        self.add_state("entities", torch.zeros(n, 3, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("words", torch.zeros(n + 1, n + 1, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("unread", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, true: Sequence[Sequence[int]], predicted: Sequence[Sequence[int | None]]) -> None:
        """Count texts.

        Args:
            true: the ids of each text's tags.
            predicted: the same; None for a word that the model didn't see, whose tag then is O.
        """
        row_of = {name: i for i, name in enumerate(self.types)}
        entities, words = torch.zeros_like(self.entities, device="cpu"), torch.zeros_like(self.words, device="cpu")
        for ids, others in zip(true, predicted, strict=True):
            tags = [self.labels[i] for i in ids]
            seen = ["O" if i is None else self.labels[i] for i in others]
            there, found = {*spans(tags)}, {*spans(seen)}
            for column, counted in enumerate((there, found, there & found)):
                for name, _, _ in counted:
                    entities[row_of[name], column] += 1
            for tag, other in zip(tags, seen, strict=True):
                words[row_of.get(_parts(tag)[1], -1), row_of.get(_parts(other)[1], -1)] += 1
            self.right += sum(map(str.__eq__, tags, seen))
            self.unread += others.count(None)
        self.entities += entities.to(self.entities.device)
        self.words += words.to(self.words.device)

    def compute(self) -> dict[str, Tensor]:
        """``precision``, ``recall``, ``f1`` and ``accuracy``; ``per_type``, of each type the first three.

        Also the counts: ``support`` (types), the true entities; ``words`` (types + 1, types + 1), a row a true
        type, the last one of words outside entities; ``unread``.
        """
        scores = _precision_recall_f1(self.entities.sum(dim=0))
        return {
            **dict(zip(("precision", "recall", "f1"), scores, strict=True)),
            "accuracy": self.right / self.words.sum().clamp(min=1),
            "per_type": _precision_recall_f1(self.entities),
            "support": self.entities[:, 0],
            "words": self.words,
            "unread": self.unread,
        }


class TokenClassification(Task):
    """A tag for each word: a token-classification head, cross-entropy at the words' first tokens, entity scores.

    Its rows are those of :class:`lightning_ft.data.tags.Tags`. Words that the model doesn't see, for the text is too
    long, count as if it had tagged them O: their entities are missed, as in a file given to ``conlleval``.

    Args:
        labels: the tags, in the order of their ids: BIO, or plain ones.

    Raises:
        ValueError: if there are fewer than two tags.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__()
        if len(labels) < 2:
            raise ValueError(f"TokenClassification needs at least two tags; there is only {list(labels)}.")
        self.labels = list(labels)
        self.metrics = nn.ModuleDict({stage: EntityCounts(self.labels) for stage in ("val", "test")})

    def build(self, name: str, quantize: Quantization | None = None) -> PreTrainedModel:
        """The pretrained model with a new head for these tags; errors as of :func:`load_pretrained`."""
        from transformers import AutoModelForTokenClassification

        return load_pretrained(AutoModelForTokenClassification, name, quantize, **named_outputs(self.labels))

    def loss(self, outputs: Tensor, labels: Labels) -> Tensor:
        """The mean cross-entropy over the words that the model sees, in fp32; outputs (batch, tokens, tags).

        It's that of all tokens with the label -100 on all but the first of each word.
        """
        tags = labels["tags"].masked_fill(labels["positions"] < 0, -100)
        logits = at_words(outputs, labels["positions"]).float()
        total = F.cross_entropy(logits.flatten(0, 1), tags.flatten(), reduction="sum")
        return total / max(1, labels["count"])

    def count(self, labels: Labels) -> int:
        """The number of words that the loss is the mean of."""
        return labels["count"]

    def update(self, stage: str, outputs: Tensor, labels: Labels) -> None:
        """Count a batch in the metrics of ``stage``, ``"val"`` or ``"test"``."""
        predicted = _known(at_words(outputs, labels["positions"]).argmax(dim=-1), labels["positions"])
        true = [[tag for tag in row if tag >= 0] for row in labels["tags"].tolist()]
        self._of(stage).update(true, [row[: len(tags)] for row, tags in zip(predicted, true, strict=True)])

    def scores(self, stage: str) -> dict[str, Tensor]:
        """F1, precision and recall of entities (micro), and the share of words whose tag is right."""
        values = self._of(stage).compute()
        return {
            **{f"entity_{name}": values[name] for name in ("f1", "precision", "recall")},
            "accuracy": values["accuracy"],
        }

    def reset(self, stage: str) -> None:
        """Begin counting anew."""
        self._of(stage).reset()

    def tables(self, stage: str) -> dict[str, Table]:
        """Of each type of entity precision, recall, F1, and the number of entities; and of words that weren't read."""
        values, types = self._of(stage).compute(), self._of(stage).types
        supports = values["support"].reshape(-1)  # which torchmetrics makes a scalar of where there is one type
        per_type = values["per_type"].double().T.tolist()
        rows = [
            [name, *(round(value, 4) for value in scores), int(support)]
            for name, scores, support in zip(types, per_type, supports, strict=True)
        ]
        tables: dict[str, Table] = {"per_type": (["type", "precision", "recall", "f1", "entities"], rows)}
        if values["unread"]:
            tables["not_read"] = (["words", "not read"], [[int(values["words"].sum()), int(values["unread"])]])
        return tables

    def pictures(self, stage: str) -> dict[str, Figure]:
        """The confusion matrix of words by the type of entity that they are in."""
        metric = self._of(stage)
        return {"confusion_matrix": confusion_matrix(metric.compute()["words"].cpu().numpy(), [*metric.types, "none"])}

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """For each row the entities: text, type, start and end in the text; the score is the mean of its words'."""
        inputs, _ = inputs_and_labels(batch)
        extra = batch["extra"]
        values = at_words(self.values(self.outputs(model, inputs)), extra["positions"])
        probabilities, ids = (found.cpu() for found in values.max(dim=-1))
        predicted = _known(ids, extra["positions"])
        rows = []
        for text, places, row, scores in zip(extra["text"], extra["spans"], predicted, probabilities, strict=True):
            tags = ["O" if i is None else self.labels[i] for i in row[: len(places)]]
            entities = []
            for name, first, end in spans(tags):
                here = slice(int(places[first, 0]), int(places[end - 1, 1]))
                score = float(scores[first:end].mean())
                entities.append(
                    {"text": text[here], "type": name, "start": here.start, "end": here.stop, "score": score}
                )
            rows.append({"entities": entities})
        return rows

    def _of(self, stage: str) -> EntityCounts:
        metric = self.metrics[stage]
        assert isinstance(metric, EntityCounts)
        return metric


def at_words(values: Tensor, positions: Tensor) -> Tensor:
    """Of values (batch, tokens, n) those at ``positions`` (batch, words): (batch, words, n); anything at -1."""
    places = positions.clamp(min=0).unsqueeze(-1).expand(-1, -1, values.shape[-1])
    return values.gather(1, places)


def _known(ids: Tensor, positions: Tensor) -> list[list[int | None]]:
    """The ids (batch, words), None of words that have no position."""
    pairs = zip(ids.tolist(), positions.tolist(), strict=True)
    return [[i if position >= 0 else None for i, position in zip(*row, strict=True)] for row in pairs]


def _parts(tag: str) -> tuple[bool, str]:
    """Whether a tag begins an entity, and of which type; the type of O is empty."""
    match = re.fullmatch("([BI])-(.+)", tag)
    if match:
        return match[1] == "B", match[2]
    return False, "" if tag == "O" else tag


def _precision_recall_f1(counts: Tensor) -> Tensor:
    """From true, predicted and right ones (..., 3) the three scores (3, ...)."""
    true, predicted, right = counts.double().unbind(dim=-1)
    return torch.stack(
        [right / predicted.clamp(min=1), right / true.clamp(min=1), 2 * right / (true + predicted).clamp(min=1)]
    ).float()
