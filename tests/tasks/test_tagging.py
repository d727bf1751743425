"""TokenClassification: the loss against Hugging Face's, entities against a naive count and the cases of seqeval."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from sklearn.metrics import confusion_matrix
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lightning_ft import FineTuner, Tags, TokenClassification
from lightning_ft.data.targets import Columns
from lightning_ft.tasks.tagging import EntityCounts, spans

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def parts(tag: str) -> tuple[str, str]:
    return (tag[0], tag[2:]) if tag[:2] in ("B-", "I-") else ("I", tag) if tag != "O" else ("O", "")


def naive_spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Every stretch of words that has all that an entity has by the rules of conlleval."""
    places = [("O", ""), *map(parts, tags), ("O", "")]
    found = set()
    for i, j in itertools.combinations(range(1, len(places)), 2):
        kind = places[i][1]
        begins = places[i][0] == "B" or places[i - 1][1] != kind
        goes_on = all(place == ("I", kind) for place in places[i + 1 : j])
        if kind and begins and goes_on and places[j] != ("I", kind):
            found.add((kind, i - 1, j - 1))
    return found


def texts(count: int, labels: Sequence[str] = LABELS, seed: int = 0) -> list[list[str]]:
    """Tags at random, many of which are no proper BIO."""
    generator = random.Random(seed)
    return [generator.choices(labels, k=generator.randrange(1, 9)) for _ in range(count)]


def ids(rows: Sequence[Sequence[str]], labels: Sequence[str] = LABELS) -> list[list[int]]:
    return [[labels.index(tag) for tag in row] for row in rows]


def counted(true: list[list[str]], predicted: list[list[str]], labels: Sequence[str] = LABELS) -> dict[str, Any]:
    metric = EntityCounts(labels)
    for part in (slice(None, 2), slice(2, None)):
        metric.update(ids(true[part], labels), ids(predicted[part], labels))
    return metric.compute()


# ----------------------------------------------------------------------------------------- entities

FOUND = {
    "B-PER I-PER O B-LOC": [("PER", 0, 2), ("LOC", 3, 4)],
    "B-PER B-PER I-PER": [("PER", 0, 1), ("PER", 1, 3)],
    "O I-PER I-PER": [("PER", 1, 3)],  # no B: conlleval counts it as begun
    "B-LOC I-PER": [("LOC", 0, 1), ("PER", 1, 2)],
    "I-PER O I-PER": [("PER", 0, 1), ("PER", 2, 3)],
    "B-a-b I-a-b": [("a-b", 0, 2)],
    "DET DET X O X": [("DET", 0, 2), ("X", 2, 3), ("X", 4, 5)],
    "O": [],
    "": [],
}


@pytest.mark.parametrize("tags", FOUND)
def test_entities_are_those_of_conlleval(tags: str) -> None:
    assert spans(tags.split()) == FOUND[tags]


@pytest.mark.parametrize("labels", [LABELS, ["O", "DET", "NOUN"]], ids=["BIO", "plain"])
def test_entities_of_any_tags_are_those_of_a_naive_count(labels: list[str]) -> None:
    for tags in texts(300, labels):
        found = spans(tags)
        assert found == sorted(found, key=lambda span: span[1])
        assert set(found) == naive_spans(tags)


def test_scores_are_those_of_seqevals_example() -> None:
    true = ["O O O B-MISC I-MISC I-MISC O".split(), "B-PER I-PER O".split()]
    predicted = ["O O B-MISC I-MISC I-MISC I-MISC O".split(), "B-PER I-PER O".split()]
    labels = ["O", "B-MISC", "I-MISC", "B-PER", "I-PER"]
    scores = counted(true, predicted, labels)
    assert {k: float(scores[k]) for k in ("precision", "recall", "f1")} == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert float(scores["accuracy"]) == pytest.approx(0.8)
    assert scores["per_type"].T.tolist() == [[0, 0, 0], [1, 1, 1]]


EDGES = {
    "another type": ("B-PER I-PER", "B-LOC I-LOC", (0, 0, 0)),
    "too short": ("B-PER I-PER O", "B-PER O O", (0, 0, 0)),
    "one cut in two": ("B-PER I-PER", "B-PER B-PER", (0, 0, 0)),
    "an I that begins": ("B-PER I-PER O", "I-PER I-PER O", (1, 1, 1)),
    "one of two": ("B-PER O B-LOC", "B-PER O O", (1, 1 / 2, 2 / 3)),
    "one too many": ("B-PER O O", "B-PER O B-LOC", (1 / 2, 1, 2 / 3)),
    "none to find": ("O O", "O B-PER", (0, 0, 0)),
    "none at all": ("O O", "O O", (0, 0, 0)),
}


@pytest.mark.parametrize(("true", "predicted", "expected"), EDGES.values(), ids=EDGES)
def test_scores_by_hand(true: str, predicted: str, expected: tuple[float, float, float]) -> None:
    scores = counted([true.split()], [predicted.split()])
    assert [float(scores[name]) for name in ("precision", "recall", "f1")] == pytest.approx(expected)


def test_one_type_of_entity_has_its_row_too() -> None:
    task = TokenClassification(["O", "B-LOC", "I-LOC"])
    task.metrics["test"].update([[1, 2, 0]], [[1, 2, 1]])
    assert task.tables("test")["per_type"][1] == [["LOC", 0.5, 1.0, pytest.approx(0.6667), 1]]
    assert task.pictures("test")["confusion_matrix"].axes


def test_scores_tables_and_picture_are_those_of_a_naive_count() -> None:
    true = texts(60)
    generator = random.Random(1)
    predicted = [[tag if generator.random() < 0.7 else generator.choice(LABELS) for tag in row] for row in true]
    task = TokenClassification(LABELS)
    for part in (slice(None, 13), slice(13, None)):
        task.metrics["test"].update(ids(true[part]), ids(predicted[part]))

    def count(rows: list[list[str]]) -> Counter[Any]:
        return Counter((i, *span) for i, row in enumerate(rows) for span in naive_spans(row))

    sets = (count(true), count(predicted), count(true) & count(predicted))
    by_type = {t: [sum(n for (_, kind, *_), n in s.items() if kind == t) for s in sets] for t in ("LOC", "PER")}

    def scores(wanted: int, found: int, right: int) -> tuple[float, float, float]:
        precision, recall = right / found, right / wanted
        return precision, recall, 2 * precision * recall / (precision + recall)

    precision, recall, f1 = scores(*(len(s) for s in sets))
    pairs = [pair for rows in zip(true, predicted, strict=True) for pair in zip(*rows, strict=True)]
    assert task.scores("test") == {
        "entity_f1": pytest.approx(f1),
        "entity_precision": pytest.approx(precision),
        "entity_recall": pytest.approx(recall),
        "accuracy": pytest.approx(sum(a == b for a, b in pairs) / len(pairs)),
    }
    tables = task.tables("test")
    columns, rows = tables["per_type"]
    assert columns == ["type", "precision", "recall", "f1", "entities"]
    assert rows == [[t, *(pytest.approx(v, abs=1e-4) for v in scores(*n)), n[0]] for t, n in by_type.items()]
    assert set(tables) == {"per_type"}  # all words were read
    kinds = [tuple(tag[2:] or "none" for tag in pair) for pair in pairs]
    expected = confusion_matrix(*zip(*kinds, strict=True), labels=["LOC", "PER", "none"])
    assert np.array_equal(task.metrics["test"].compute()["words"].numpy(), expected)
    axes = task.pictures("test")["confusion_matrix"].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["LOC", "PER", "none"]
    task.reset("test")
    task.metrics["test"].update([[0]], [[0]])
    assert float(task.scores("test")["accuracy"]) == 1


def test_what_several_processes_count_adds_up() -> None:
    true, predicted = ids(texts(20)), ids([[random.Random(i).choice(LABELS) for i in row] for row in ids(texts(20))])
    whole, one, other = (EntityCounts(LABELS) for _ in range(3))
    whole.update(true, predicted)
    one.update(true[:7], predicted[:7])
    other.update(true[7:], predicted[7:])
    one.merge_state(other)  # as the states are reduced between processes
    assert {k: v.tolist() for k, v in one.compute().items()} == {k: v.tolist() for k, v in whole.compute().items()}


# ----------------------------------------------------------------------------------------- the loss

ROWS = [
    (["the", "battery", "xyz", ".", "good"], ["O", "B-LOC", "I-LOC", "O", "B-PER"]),
    (["good"], ["B-PER"]),
    (["battery", "battery", "awful", "not", "good", "works"], ["B-LOC", "I-LOC", "O", "O", "B-PER", "I-PER"]),
]


def loader(tokenizer_dir: str, batch_size: int, limit: int = 64) -> DataLoader[Any]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    rows = Dataset.from_dict({"words": [row[0] for row in ROWS], "tags": [row[1] for row in ROWS]})
    target = Tags()
    encoded = target.encode(rows, Columns("words", "tags"), {"labels": LABELS}, tokenizer, limit)
    return DataLoader(encoded.remove_columns("length"), batch_size=batch_size, collate_fn=target.collator(tokenizer))


@pytest.fixture
def module(tiny_bert_dir: str) -> FineTuner:
    module = FineTuner(tiny_bert_dir, TokenClassification(LABELS))
    torch.nn.init.normal_(module.model.classifier.weight, std=0.5)
    return module


def test_loss_is_that_of_first_tokens_alone(module: FineTuner, tiny_bert_dir: str) -> None:
    (batch,) = loader(tiny_bert_dir, 3, limit=7)  # which cuts two of the texts
    module.model.eval()
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "extra")}
    labels = torch.full_like(batch["input_ids"], -100)
    for row, (tags, positions) in enumerate(zip(batch["labels"]["tags"], batch["labels"]["positions"], strict=True)):
        for tag, position in zip(tags, positions, strict=True):
            if position >= 0:
                labels[row, position] = tag
    with torch.no_grad():
        theirs = module.model(**inputs, labels=labels)
    assert int((labels != -100).sum()) == module.task.count(batch["labels"]) == 9
    assert float(module.task.loss(theirs.logits, batch["labels"])) == pytest.approx(float(theirs.loss), rel=1e-6)
    assert module.task.loss(theirs.logits.bfloat16(), batch["labels"]).dtype == torch.float32


def trainer() -> L.Trainer:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet)


def test_loss_of_an_epoch_is_the_mean_over_words_however_batched(module: FineTuner, tiny_bert_dir: str) -> None:
    [one], [three] = (trainer().test(module, loader(tiny_bert_dir, size), verbose=False) for size in (3, 1))
    assert one == pytest.approx(three, rel=1e-5)


def test_words_that_are_not_read_count_as_missed(tiny_bert_dir: str) -> None:
    task = TokenClassification(LABELS)
    (batch,) = loader(tiny_bert_dir, 3, limit=5)
    perfect = torch.zeros(*batch["input_ids"].shape, len(LABELS))
    seen = 0
    for row, (tags, positions) in enumerate(zip(batch["labels"]["tags"], batch["labels"]["positions"], strict=True)):
        for tag, position in zip(tags, positions, strict=True):
            if position >= 0:
                perfect[row, position, tag] = 9
                seen += 1
    task.update("test", perfect, batch["labels"])
    scores = task.scores("test")
    # Read: the battery x(yz) | good | battery battery awful; of five entities three are found.
    assert float(scores["entity_precision"]) == 1
    assert float(scores["entity_recall"]) == pytest.approx(3 / 5)
    assert float(scores["accuracy"]) == pytest.approx((seen + 2) / 12)  # of those not read two are O
    assert task.tables("test")["not_read"] == (["words", "not read"], [[12, 12 - seen]])


# ----------------------------------------------------------------------------------------- predictions


def test_predictions_are_entities_with_their_places_in_the_text() -> None:
    text = "In  New-York, Ann"  # In New - York , Ann
    tags = ["O", "B-LOC", "I-LOC", "I-LOC", "O", "I-PER"]
    positions = torch.tensor([[1, 2, 3, 5, 6, 7], [1, -1, -1, -1, -1, -1]])
    logits = torch.randn(2, 9, len(LABELS))
    for position, tag in zip(positions[0], tags, strict=True):
        logits[0, position, LABELS.index(tag)] = 4
    logits[1, 1] = 5 * F.one_hot(torch.tensor(1), 5)
    places = torch.tensor([[0, 2], [4, 7], [7, 8], [8, 12], [12, 13], [14, 17]])
    extra = {"positions": positions, "spans": [places, places[:2]], "text": [text, text]}
    model: Any = lambda: SimpleNamespace(logits=logits)  # noqa: E731
    first, second = TokenClassification(LABELS).predict(model, {"extra": extra})
    probabilities = logits.softmax(-1)

    def entity(row: int, name: str, start: int, end: int, tagged: dict[int, str]) -> dict[str, Any]:
        score = np.mean([float(probabilities[row, i, LABELS.index(tag)]) for i, tag in tagged.items()])
        return {"text": text[start:end], "type": name, "start": start, "end": end, "score": pytest.approx(score)}

    york = entity(0, "LOC", 4, 12, {2: "B-LOC", 3: "I-LOC", 5: "I-LOC"})
    assert first == {"entities": [york, entity(0, "PER", 14, 17, {7: "I-PER"})]}
    assert york["text"] == "New-York"
    assert second == {"entities": [entity(1, "LOC", 0, 2, {1: "B-LOC"})]}  # its second word isn't read


def test_built_model_knows_the_tags_and_keeps_the_base(tiny_bert_dir: str) -> None:
    from transformers import AutoModel

    model = TokenClassification(LABELS).build(tiny_bert_dir)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {tag: i for i, tag in enumerate(LABELS)}
    base: dict[str, Tensor] = AutoModel.from_pretrained(tiny_bert_dir).state_dict()
    built = model.base_model.state_dict()
    assert all(torch.equal(value, base[name]) for name, value in built.items())


def test_one_tag_is_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match="at least two tags"):
        TokenClassification(["O"])
