"""Faults in data, found before they are trained on. Pure functions from rows to findings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_ft.data.quality.confidence import Confidence, Embed, confidence, suspicious
from lightning_ft.data.quality.duplicates import duplicates, leaks, near, same_texts
from lightning_ft.data.quality.findings import Finding, Splits, Track, each, without_examples_of, worst_first
from lightning_ft.data.quality.labels import contradictions, empty, imbalance, unseen
from lightning_ft.data.quality.privacy import personal_data, redact
from lightning_ft.data.quality.tokens import Tokens, tokens, truncation, unknown_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Examined:
    """What :func:`examine` found.

    Attributes:
        findings: the worst first; their examples hold no personal data.
        tokens: of each split.
        confidence: what the embeddings say of the labels; None where they weren't asked, or can't say.
    """

    findings: list[Finding]
    tokens: dict[str, Tokens]
    confidence: Confidence | None


def examine(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    embed: Embed | None = None,
    nearly: bool = True,
    carved: bool = False,
    most: int | None = None,
    seed: int = 0,
    track: Track = each,
) -> Examined:
    """Look for all that can be found.

    Args:
        splits: the data (:func:`lightning_ft.data.quality.findings.rows_of`).
        tokenizer: the base's.
        limit: how many tokens of a text are read.
        embed: gives embeddings, by which labels are judged; None: they aren't.
        nearly: whether to look for near duplicates.
        carved: whether splits that aren't there will be carved out of train.
        most: tokenise no more texts a split than these; None for all.
        seed: of the cross-validation of labels.
        track: shows how far it is.
    """
    places = same_texts(splits)
    found = [*empty(splits), *unseen(splits), *contradictions(splits, places), *leaks(splits, places)]
    found += [*duplicates(splits, places, carved), *imbalance(splits), *personal_data(splits)]
    if nearly:
        found += near(splits, places, track)
    its_tokens = tokens(splits, tokenizer, most, track)
    found += [
        *truncation({split: its for split, its in its_tokens.items() if splits[split].cut}, limit),
        *unknown_tokens(splits, its_tokens),
    ]
    judged = None
    if embed is not None:
        judged = confidence(splits, embed, seed, track)
        found += suspicious(splits, judged)
    return Examined(without_examples_of(worst_first(found), lambda text: redact(text)[0]), its_tokens, judged)
