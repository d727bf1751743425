"""Labels that the base's own embeddings speak against: confident learning (Northcutt et al. 2021).

A logistic regression on the embeddings of the texts, cross-validated, gives each row i the probability p̂ᵢ(j) of each
class j by a model that never saw the row. With the mean self-confidence of a class as its threshold,

    t_j = mean of p̂ᵢ(j) over rows i labelled j

row i is counted as a j where p̂ᵢ(j) ≥ t_j, of several such j the likeliest ("Confident Learning: Estimating Uncertainty
in Dataset Labels", JAIR 70, equations 1 and 2). Rows counted as another class than they are labelled are its label
errors. Here two more must hold, since a plain classifier is often wrong about rows that are right, and a list of these
is no help: the label itself has at most :data:`LEAST` of the probability, and the other class at least :data:`MOST`.
Where the classifier is right about fewer than :data:`RELIABLE` of the rows of the classes, no single row is accused: of
the bundled English reviews, of which MiniLM's embeddings tell 71%, such a list was wrong three times in four (5% of the
labels flipped, threshold 0.7), or empty (0.9).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_ft.data.quality.findings import Finding, Splits, Track, count, each, excerpt, numbered

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts to their embeddings (texts, width)."""

LEAST, MOST, RELIABLE = 0.1, 0.9, 0.8
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS, FEWEST = 5, 20
"""Of the cross-validation; and the rows a class must have, without which nothing is said of it."""


@dataclass(frozen=True)
class Confidence:
    """What the embeddings say of the labels.

    Attributes:
        places: split and index of each row that was looked at.
        classes: their names, in the order of the probabilities.
        given: the number of each row's own class.
        probabilities: of each class, by a model that didn't see the row (rows, classes).
        left_out: classes with too few rows.
    """

    places: list[tuple[str, int]]
    classes: list[str]
    given: np.ndarray
    probabilities: np.ndarray
    left_out: list[str]

    @property
    def reliability(self) -> float:
        """The share of rows whose likeliest class is their own: the mean over the classes."""
        right = self.probabilities.argmax(axis=1) == self.given
        return float(np.mean([right[self.given == j].mean() for j in range(len(self.classes))]))

    @property
    def own(self) -> np.ndarray:
        """The probability of each row's own label."""
        return self.probabilities[np.arange(len(self.given)), self.given]


def confidence(splits: Splits, embed: Embed, seed: int = 0, track: Track = each) -> Confidence | None:
    """The cross-validated probabilities; None where labels aren't one class a row, or fewer than two have enough rows.

    Args:
        splits: the data, all of which is looked at together.
        embed: gives the embeddings.
        seed: of the folds.
        track: shows how far it is.
    """
    found = [
        ((split, i), text, data.labels[i])
        for split, data in splits.items()
        if data.kind == "class"
        for i, text in data.readable()
        if data.labels[i] is not None
    ]
    counts = Counter(label for *_, label in found)
    classes = sorted(name for name, rows in counts.items() if rows >= FEWEST)
    if len(classes) < 2:
        return None
    number = {name: i for i, name in enumerate(classes)}
    found = [row for row in found if row[2] in number]
    given = np.array([number[label] for *_, label in found])
    probabilities = cross_validated(embed([text for _, text, _ in found]), given, seed, track)
    left_out = sorted(set(counts) - set(classes))
    return Confidence([place for place, *_ in found], classes, given, probabilities, left_out)


def cross_validated(embeddings: np.ndarray, given: np.ndarray, seed: int = 0, track: Track = each) -> np.ndarray:
    """Probabilities of the classes for each row, by a logistic regression on the folds that it isn't in.

    Of several strengths of its penalty the one with the least log loss: by it a probability means what it says.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # nearly there is near enough
        for c in track("judging labels", PENALTIES):
            model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=200))
            found.append(cross_val_predict(model, embeddings, given, cv=folds, method="predict_proba"))
    return min(found, key=lambda probabilities: log_loss(given, probabilities))


def errors(probabilities: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Which rows are label errors by confident learning, and clearly so."""
    rows, classes = probabilities.shape
    own = probabilities[np.arange(rows), given]
    thresholds = np.array([own[given == j].mean() if (given == j).any() else 1.0 for j in range(classes)])
    confident = np.where(probabilities >= thresholds, probabilities, 0.0)
    other = confident.argmax(axis=1)
    return (confident.max(axis=1) >= MOST) & (other != given) & (own <= LEAST)


def suspicious(splits: Splits, found: Confidence | None) -> Iterator[Finding]:
    """Rows whose label is likely wrong, the likeliest first in the examples."""
    if found is None:
        if any(data.kind == "class" for data in splits.values()):
            message = f"Labels weren't looked at one by one: fewer than two have {FEWEST} rows or more."
            yield Finding("suspicious_label", "note", next(iter(splits)), (), message)
        return
    if found.left_out:
        names = ", ".join(found.left_out[:10]) + (", …" if len(found.left_out) > 10 else "")
        message = f"Rows with these labels weren't looked at, for each has fewer than {FEWEST}: {names}."
        yield Finding("suspicious_label", "note", next(iter(splits)), (), message)
    if found.reliability < RELIABLE:
        message = (
            "Whether single labels are wrong can't be said: by this base's embeddings only"
            f" {found.reliability:.0%} of them are told right, and {RELIABLE:.0%} are needed."
            " A larger base may do better."
        )
        yield Finding("suspicious_label", "note", next(iter(splits)), (), message)
        return
    wrong = np.flatnonzero(errors(found.probabilities, found.given))
    wrong = wrong[np.argsort(found.own[wrong], kind="stable")]
    for split, data in splits.items():
        its = [(k, found.places[k][1]) for k in wrong.tolist() if found.places[k][0] == split]
        if not its:
            continue
        rows = sorted(i + 1 for _, i in its)
        examples = [
            f"row {i + 1}: {found.classes[found.given[k]]}, or rather {found.classes[found.probabilities[k].argmax()]}"
            f" ({found.probabilities[k].max():.2f})? {excerpt(data.texts[i])}"
            for k, i in its[:10]
        ]
        message = f"{count(len(rows))} whose label may be wrong: {numbered(rows)}. Read them."
        yield Finding("suspicious_label", "warning", split, tuple(rows), message, tuple(examples))


def mean_pooled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    track: Track = each,
) -> Embed:
    """The function that embeds texts by the mean of the base's last hidden state over their tokens.

    Args:
        model: the base without a head; of an encoder with a decoder the encoder is used.
        tokenizer: the base's.
        limit: how many tokens of a text are read.
        batch_size: texts at a time, of like length.
        device: where to compute.
        track: shows how far it is.
    """
    import torch

    trunk: Any = model.get_encoder() if model.config.is_encoder_decoder else model
    trunk = trunk.to(device).eval()

    def embed(texts: Sequence[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        result: np.ndarray | None = None
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for rows in track("embedding", batches):
            batch = tokenizer(
                [texts[i] for i in rows], truncation=True, max_length=limit, padding=True, return_tensors="pt"
            ).to(device)
            with torch.inference_mode():
                states = trunk(**batch).last_hidden_state.float()  # (batch, tokens, width)
            mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
            means = ((states * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu().numpy()
            if result is None:
                result = np.empty((len(texts), means.shape[1]), np.float32)
            result[rows] = means
        assert result is not None
        return result

    return embed
