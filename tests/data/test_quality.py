"""What is planted in data is found, with its rows; in clean data nothing is."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_ft.data.language import Chats, Completions, Texts
from lightning_ft.data.multilabels import MultiLabels
from lightning_ft.data.numbers import Numbers
from lightning_ft.data.quality import examine
from lightning_ft.data.quality.cleaning import plan, write
from lightning_ft.data.quality.confidence import FEWEST, confidence, cross_validated, errors, suspicious
from lightning_ft.data.quality.duplicates import NEARLY, runs, similar
from lightning_ft.data.quality.findings import KINDS, SEVERITIES, Finding, Rows, Splits, identity, rows_of
from lightning_ft.data.quality.privacy import personal_data
from lightning_ft.data.quality.tokens import histogram, tokens
from lightning_ft.data.sources import DataError, read
from lightning_ft.data.targets import Classes, Columns, Several, Target

WORDS = (
    "the screen battery case box lens film engine door shop clock lamp chair bread water road river stone glass paper"
    " was is seems looks feels stays became turned broke works opens closes arrived left fell stood"
    " very quite rather hardly never always often soon late early again still almost"
    " good bad great awful small large warm cold bright dark loud quiet soft hard sharp blunt new old clean dirty"
).split()
LABELS = ("bad", "good")

COLUMNS = Columns("text", "label")


def sentence(draw: random.Random, words: int = 14) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


def clean(rows: int = 60, seed: int = 0) -> dict[str, Rows]:
    """Three splits of sentences that are all different, and whose label their first word says."""
    draw = random.Random(seed)
    sizes = {"train": rows, "validation": rows // 3, "test": rows // 3}
    return {
        split: Rows([f"{LABELS[i % 2]} {sentence(draw)}" for i in range(size)], [LABELS[i % 2] for i in range(size)])
        for split, size in sizes.items()
    }


def with_text(splits: Splits, split: str, changes: dict[int, Any]) -> dict[str, Rows]:
    """The splits with other texts in these rows, counted from 1."""
    rows = splits[split]
    texts = [changes.get(i, text) for i, text in enumerate(rows.texts, start=1)]
    return {**splits, split: replace(rows, texts=texts)}


def with_label(splits: Splits, split: str, changes: dict[int, Any]) -> dict[str, Rows]:
    rows = splits[split]
    return {**splits, split: replace(rows, labels=[changes.get(i, y) for i, y in enumerate(rows.labels, start=1)])}


@pytest.fixture(scope="module")
def tokenizer(tiny_bert_dir: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_bert_dir)


@pytest.fixture
def check(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What is found: kind, split and rows of each."""

    def found(splits: Splits, limit: int = 200, **options: Any) -> list[tuple[str, str, tuple[int, ...]]]:
        findings = examine(splits, tokenizer, limit, **options).findings
        assert all(f.kind in KINDS and f.severity in SEVERITIES and f.message for f in findings)
        return [(f.kind, f.split, f.rows) for f in findings]

    return found


def by_first_word(texts: Iterable[str]) -> np.ndarray:
    """Embeddings in which the label is plain to see."""
    noise = np.random.default_rng(0)
    return np.array([[4.0 * text.startswith("good"), 1.0] for text in texts]) + noise.normal(
        0, 0.3, (len(list(texts)), 2)
    )


def test_in_clean_data_nothing_is_found(check: Any) -> None:
    assert check(clean(120), embed=by_first_word) == []


# -------------------------------------------------------------------------------------- planted faults


def test_the_same_text_again_is_a_duplicate_whatever_its_case_and_spaces(check: Any) -> None:
    splits = clean()
    texts = splits["train"].texts
    planted = with_text(splits, "train", {11: f"  {texts[0].upper()}\n", 31: texts[0], 12: texts[3]})
    assert check(planted) == [("duplicate", "train", (11, 12, 31))]


def test_a_row_that_is_in_a_later_split_too_is_a_leak_of_the_earlier_one(check: Any) -> None:
    splits = clean()
    planted = with_text(splits, "train", {5: splits["test"].texts[4], 7: splits["validation"].texts[6]})
    planted = with_text(planted, "validation", {2: splits["test"].texts[9]})
    assert check(planted) == [
        ("leak", "train", (7,)), ("leak", "train", (5,)), ("leak", "validation", (2,)),
    ]  # fmt: skip


def test_a_text_with_a_word_changed_is_nearly_the_same(check: Any) -> None:
    words = sentence(random.Random(1), 30).split()
    changed = " ".join([*words[:9], "blue", *words[10:]])
    planted = with_text(clean(), "train", {3: " ".join(words), 9: changed + "!"})
    planted = with_text(planted, "test", {3: changed})
    assert check(planted) == [("near_leak", "train", (3, 9)), ("near_duplicate", "train", (9,))]
    assert check(planted, nearly=False) == []


def test_one_text_with_two_labels_is_a_contradiction_wherever_it_stands(check: Any) -> None:
    splits = clean()
    text = splits["train"].texts[0]
    planted = with_text(splits, "train", {6: text})
    assert check(planted) == [("contradiction", "train", (1, 6)), ("duplicate", "train", (6,))]
    planted = with_text(splits, "test", {6: text})
    assert check(planted) == [
        ("contradiction", "train", (1,)), ("contradiction", "test", (6,)), ("leak", "train", (1,)),
    ]  # fmt: skip


def test_numbers_contradict_when_they_are_far_apart_and_texts_never_do(check: Any) -> None:
    texts = clean()["train"].texts
    numbers = [i / 7 for i in range(len(texts))]

    def splits(other: float, kind: Any = "number") -> dict[str, Rows]:
        labels: list[Any] = [numbers[0], other, *numbers[2:]]
        labels = labels if kind == "number" else [str(y) for y in labels]
        return {"train": Rows([texts[0], texts[0], *texts[2:]], labels, kind)}

    assert check(splits(0.1)) == [("duplicate", "train", (2,))]
    assert check(splits(8.0)) == [("contradiction", "train", (1, 2)), ("duplicate", "train", (2,))]
    assert check(splits(8.0, "text"), nearly=False) == []  # an answer more to one question
    same = splits(8.0, "text")["train"]
    same = replace(same, labels=[same.labels[0], *same.labels[:1], *same.labels[2:]])
    assert check({"train": same}) == [("duplicate", "train", (2,))]
    assert check(splits(8.0, "tags")) == [("contradiction", "train", (1, 2)), ("duplicate", "train", (2,))]


def test_several_classes_are_the_same_in_any_order_and_rare_ones_are_counted_one_by_one(check: Any) -> None:
    draw = random.Random(1)
    labels = [("a", "b") if i % 2 else ("a",) for i in range(60)]
    train = Rows([sentence(draw) for _ in labels], [*labels[:-1], ("a", "c")], "classes")
    assert check({"train": train}) == [("imbalance", "train", ())]
    assert check({"train": replace(train, labels=labels)}) == []


def test_rows_without_a_text_or_a_label_are_found_and_do_not_disturb(check: Any) -> None:
    planted = with_label(with_text(clean(), "train", {2: "", 3: None, 4: 5.0, 5: " \n"}), "test", {8: None})
    assert check(planted) == [("empty", "train", (2, 3, 4, 5)), ("no_label", "test", (8,))]


def test_a_label_that_training_never_shows_is_found(check: Any) -> None:
    assert check(with_label(clean(), "test", {8: "godo"})) == [("unseen_label", "test", (8,))]


def test_a_rare_label_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    rare = dict.fromkeys((1, 2, 3), "rare")
    (found,) = examine(with_label(clean(300), "train", rare), tokenizer, 200).findings
    assert (found.kind, found.severity, found.split) == ("imbalance", "warning", "train")
    assert "with few rows beside" in found.message
    assert "'rare' 3" in found.message


def test_of_few_rows_of_every_label_it_is_not_said_that_one_has_more(tokenizer: PreTrainedTokenizerBase) -> None:
    (found,) = examine({"train": clean(12)["train"]}, tokenizer, 200).findings
    assert (found.kind, found.severity) == ("imbalance", "note")
    assert "with fewer than 10 rows" in found.message
    assert "beside" not in found.message


def test_what_is_cut_is_told_with_its_share(tokenizer: PreTrainedTokenizerBase) -> None:
    for rows, severity in (((7,), "note"), (tuple(range(1, 8)), "warning")):
        planted = with_text(clean(), "train", {row: f"{row} " + sentence(random.Random(row), 90) for row in rows})
        (found,) = examine(planted, tokenizer, 200).findings
        assert (found.kind, found.severity, found.split, found.rows) == ("truncation", severity, "train", rows)
        assert f"{len(rows) / 60:.1%}" in found.message


def test_a_language_that_the_base_cannot_read_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choice("电池屏幕很好坏了不错还行声音清楚") for _ in range(20)) for _ in range(30)]
    (found,) = examine({"train": Rows(texts, ["a", "b"] * 15)}, tokenizer, 200).findings
    assert (found.kind, found.severity, found.rows) == ("unknown_tokens", "error", tuple(range(1, 31)))
    planted = with_text(clean(), "train", {row: texts[row] for row in (4, 5, 6, 7)})
    (found,) = examine(planted, tokenizer, 200).findings
    assert (found.severity, found.rows) == ("warning", (4, 5, 6, 7))


def test_a_tokenizer_that_takes_characters_apart_is_told(shared_data: Path) -> None:
    letters = AutoTokenizer.from_pretrained(shared_data / "stories260K")  # of English words; the rest are bytes
    texts = [f"很好{chr(0x4E00 + i)}不错的电池和屏幕" for i in range(20)]
    kinds = [f.kind for f in examine({"train": Rows(texts, ["a", "b"] * 10)}, letters, 200, nearly=False).findings]
    assert kinds == ["unknown_tokens"]
    assert examine(clean(), letters, 200).findings == []


def test_labels_that_the_embeddings_speak_against_are_found(check: Any) -> None:
    wrong = {3: "bad", 4: "good", 9: "bad"}
    splits = clean(120)
    flipped = {row: {"bad": "good", "good": "bad"}[splits["train"].labels[row - 1]] for row in wrong}
    planted = with_label(splits, "train", flipped)
    assert check(planted, embed=by_first_word) == [("suspicious_label", "train", (3, 4, 9))]


def test_of_labels_with_few_rows_it_is_said_that_they_were_not_judged(check: Any) -> None:
    few = clean(FEWEST)
    assert check({"train": few["train"]}, embed=by_first_word) == [("suspicious_label", "train", ())]
    rare = dict.fromkeys(range(1, 12), "rare")
    found = check(with_label(clean(90), "train", rare), embed=by_first_word)
    assert ("suspicious_label", "train", ()) in found


# ----------------------------------------------------------------------------------------- the reasons


def test_embeddings_that_tell_nothing_accuse_nobody() -> None:
    draw = np.random.default_rng(0)
    given = draw.integers(0, 3, 600)
    assert not errors(cross_validated(draw.normal(size=(600, 16)), given), given).any()


def test_confident_learning_as_its_equations_say() -> None:
    draw = np.random.default_rng(1)
    probabilities, given = draw.dirichlet([0.2] * 3, 500), draw.integers(0, 3, 500)
    thresholds = [np.mean([p[j] for p, y in zip(probabilities, given, strict=True) if y == j]) for j in range(3)]
    for p, y, found in zip(probabilities, given, errors(probabilities, given), strict=True):
        counted = [j for j in range(3) if p[j] >= thresholds[j]]
        other = max(counted, key=lambda j: p[j]) if counted else y
        assert found == (other != y and p[other] >= 0.9 and p[y] <= 0.1)


def test_every_probability_is_of_a_model_that_did_not_see_the_row() -> None:
    """Else rows whose embedding is theirs alone would be sure of their label, whatever it is."""
    draw = np.random.default_rng(0)
    splits = {"train": Rows([f"text {i}" for i in range(100)], [LABELS[i % 2] for i in draw.permutation(100)])}
    found = confidence(splits, lambda texts: 10 * np.eye(len(texts)))
    assert found is not None
    assert np.abs(found.own - 0.5).max() < 0.05
    (said,) = suspicious(splits, found)
    assert (said.severity, said.rows) == ("note", ())
    assert "are needed" in said.message


def jaccard(a: str, b: str) -> float:
    one, other = ({t[i : i + 5] for i in range(len(t) - 4)} for t in (a, b))
    return len(one & other) / len(one | other)


def test_near_pairs_are_those_of_the_definition() -> None:
    draw = random.Random(0)
    texts = []
    for _ in range(40):
        words = sentence(draw, draw.randint(8, 60)).split()
        for _ in range(4):
            texts.append(" ".join(words))
            words[draw.randrange(len(words))] = draw.choice(WORDS)
    texts = list(dict.fromkeys(texts))
    pairs = {(i, j) for j in range(len(texts)) for i in range(j) if jaccard(texts[i], texts[j]) >= NEARLY}
    assert len(pairs) > 50
    assert set(similar(texts)) == pairs


def test_runs_are_of_five_characters() -> None:
    for text in ("", "abcd", "abcde", "很好的电池很好的电池", "aaaaaaaaaa", "the screen is good"):
        assert len(runs(text)) == len({text[i : i + 5] for i in range(len(text) - 4)})


def test_of_data_made_by_a_template_the_time_is_bounded() -> None:
    base = sentence(random.Random(0), 30)
    texts = [f"{base} {i}" for i in range(2_000)]
    pairs = similar(texts)
    assert {j for _, j in pairs} == set(range(1, 2_000))  # each has a likeness before it
    assert len(pairs) <= 2_000 * 50 * 3


def test_short_texts_are_nearly_the_same_only_by_their_letters() -> None:
    assert similar([identity(t) for t in ("Good phone!", "good, phone", "good phones", "", "!?", "…")]) == [(0, 1)]


def test_a_bin_of_the_histogram_ends_at_the_cut() -> None:
    for limit in (1, 7, 64, 128, 512):
        for top in (1, 5, 63, 64, 65, 700):
            lengths = list(range(1, top + 1))
            edges, counts = histogram(lengths, limit)
            assert sum(counts) == top
            assert limit >= top or limit + 1 in edges
            assert sum(counts[i] for i in range(len(counts)) if edges[i] > limit) == max(0, top - limit)


def test_a_part_of_the_texts_is_spread_over_all(tokenizer: PreTrainedTokenizerBase) -> None:
    found = tokens(clean(), tokenizer, most=10)["train"]
    assert len(found.rows) == 10
    assert (found.rows[0], found.rows[-1]) == (1, 55)
    assert tokens(clean(), tokenizer, most=100)["train"].rows == tuple(range(1, 61))


# ------------------------------------------------------------------------------------- from raw splits


def labelled(labels: list[Any], feature: Any = None, texts: list[Any] | None = None) -> Dataset:
    rows = Dataset.from_dict({"text": texts or [f"text {i}" for i in range(len(labels))], "label": labels})
    return rows.cast_column("label", feature) if feature is not None else rows


@pytest.mark.parametrize(
    ("rows", "kind", "labels"),
    [
        (labelled(["a", "b", None, " "]), "class", ["a", "b", None, None]),
        (labelled([1, 0, None]), "class", ["1", "0", None]),
        (labelled([1, 0, -1], ClassLabel(names=["no", "yes"])), "class", ["yes", "no", None]),
        (labelled([["b", "a"], [], ["a"]]), "classes", [("a", "b"), (), ("a",)]),
        (labelled([[1, 0], []], Sequence(ClassLabel(names=["no", "yes"]))), "classes", [("no", "yes"), ()]),
        (labelled([["B", "O"]], texts=[["a", "word"]]), "tags", ["B O"]),
        (labelled([i / 8 for i in range(30)]), "number", [i / 8 for i in range(30)]),
        (labelled([1.0, 2.0, float("nan")]), "class", ["1.0", "2.0", None]),
    ],
)
def test_labels_of_every_form_are_read(rows: Dataset, kind: str, labels: list[Any]) -> None:
    target = type("Kind", (Classes,), {"label_kind": kind})()
    found = rows_of({"train": rows}, target, COLUMNS)["train"]
    assert (found.kind, list(found.labels)) == (kind, labels)
    assert all(isinstance(text, str) for text in found.texts)


def test_what_is_learned_apart_is_one_label_of_its_text() -> None:
    rows = Dataset.from_dict(
        {"text": ["a", "b", "A"], "score": [3, None, 4], "tone": ["dry", "dry", "dry"], "size": [1.5, 2.5, 3.5]}
    )
    target = Several({"score": Classes(), "tone": Classes(), "size": Numbers()})
    columns = Columns("text", {"score": "score", "tone": "tone", "size": "size"})
    found = rows_of({"train": rows}, target, columns)["train"]
    assert (found.kind, list(found.labels)) == ("classes", [("score 3", "tone dry"), None, ("score 4", "tone dry")])
    assert plan({"train": found})["train"].removed == {0: "contradiction", 1: "no_label", 2: "contradiction"}


def test_of_a_chat_the_messages_are_the_text_and_there_need_be_no_label() -> None:
    rows = Dataset.from_dict(
        {"messages": [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]]}
    )
    found = rows_of({"train": rows}, Classes(), Columns("messages", None))["train"]
    assert (list(found.texts), list(found.labels)) == (["hi\nyo"], [None])


def test_rows_that_need_no_label_lack_none(tokenizer: PreTrainedTokenizerBase) -> None:
    splits = {"train": Dataset.from_dict({"text": clean()["train"].texts})}
    rows = rows_of(splits, Texts(), Columns("text", "label"))
    assert examine(rows, tokenizer, 5).findings == []  # nor is a text cut that goes into blocks
    assert plan(rows)["train"].removed == {}


def test_what_is_no_number_is_no_label_and_its_row_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = rows_of(
        {"train": labelled(["1.5", "2", "many", "inf"], texts=list(clean()["train"].texts[:4]))}, Numbers(), COLUMNS
    )
    assert list(rows["train"].labels) == [1.5, 2.0, None, None]
    assert [(f.kind, f.rows) for f in examine(rows, tokenizer, 200).findings] == [("no_label", (3, 4))]


@pytest.mark.parametrize(
    ("target", "labels"),
    [
        (MultiLabels(";"), ["late; broken", "", "broken;late", None]),
        (MultiLabels(), [["late", "broken"], [], ["broken", "late", "late"], None]),
    ],
)
def test_several_labels_are_read_as_the_target_reads_them(target: MultiLabels, labels: list[Any]) -> None:
    found = rows_of({"train": labelled(labels)}, target, COLUMNS)
    assert list(found["train"].labels) == [("broken", "late"), (), ("broken", "late"), None]
    assert plan(found)["train"].removed == {3: "no_label"}


def test_a_column_that_is_not_there_is_said() -> None:
    with pytest.raises(DataError, match=r"no column 'body'; the columns are text, label"):
        rows_of({"train": labelled(["a"])}, Classes(), Columns("body", "label"))


# ------------------------------------------------------------------------------------------- real data


def test_the_bundled_reviews_have_no_errors(minilm_dir: str) -> None:
    english = rows_of(read("bundled:reviews_en"), Classes(), COLUMNS)
    found = examine(english, AutoTokenizer.from_pretrained(minilm_dir), 512).findings
    assert [f for f in found if f.severity != "note"] == []


def test_the_duplicates_of_the_medical_abstracts_are_found(shared_data: Path, minilm_dir: str) -> None:
    file = shared_data / "medical_abstracts" / "medical_tc_test.csv"
    rows = rows_of(read(file), Classes(), Columns("medical_abstract", "condition_label"))
    found = examine(rows, AutoTokenizer.from_pretrained(minilm_dir), 256, nearly=False, most=100).findings
    rows_found = {f.kind: f.rows for f in found}
    assert len(rows_found["duplicate"]) == 118


# --------------------------------------------------------------------------------------------- cleaning


def applied(splits: Splits) -> dict[str, Rows]:
    done = {}
    for split, cleaning in plan(splits).items():
        rows = splits[split]
        left = [i for i in range(len(rows.texts)) if i not in cleaning.removed]
        texts = [cleaning.texts.get(i, rows.texts[i]) for i in left]
        done[split] = Rows(texts, [rows.labels[i] for i in left], rows.kind)
    return done


def test_of_what_is_removed_a_check_finds_no_more(tokenizer: PreTrainedTokenizerBase) -> None:
    draw = random.Random(3)
    for seed in range(5):
        splits: dict[str, Rows] = clean(seed=seed)
        pool = [text for rows in splits.values() for text in rows.texts[:6]]
        pool += ["", "write to a@b.com", "write to c@d.org", "call 555-234-5678 now", None]
        for split in splits:
            changes = {draw.randint(1, 20): draw.choice(pool) for _ in range(8)}
            splits = with_text(splits, split, changes)
        removable = {"empty", "no_label", "contradiction", "leak", "duplicate", "personal_data"}
        before = {f.kind for f in examine(splits, tokenizer, 200).findings} & removable
        after = {f.kind for f in examine(applied(splits), tokenizer, 200).findings} & removable
        assert before
        assert not after
        assert plan(applied(splits)) == {split: replace(c) for split, c in plan(clean()).items()}, (
            "nothing is left to do"
        )


def test_of_copies_the_first_stays_and_of_leaks_the_later_split() -> None:
    splits = clean()
    text = splits["train"].texts[0]
    planted = with_text(splits, "train", {3: text, 5: text, 7: splits["test"].texts[0]})
    cleanings = plan(planted)
    assert cleanings["train"].removed == {2: "duplicate", 4: "duplicate", 6: "leak"}
    assert not cleanings["test"].removed


def written(raw: Dataset, target: Target, columns: Columns, folder: Path) -> Dataset:
    cleanings = plan(rows_of({"train": raw}, target, columns))
    write({"train": raw}, columns, cleanings, folder)
    return Dataset.from_list([json.loads(line) for line in (folder / "train.jsonl").read_text("utf-8").splitlines()])


def test_of_a_completion_too_personal_data_are_replaced_and_a_prompt_keeps_all_its_completions(tmp_path: Path) -> None:
    raw = Dataset.from_dict(
        {"text": ["Whom to ask?"] * 3, "label": ["Ann, a@b.com", "Bob, c@d.org", "ann, e@f.net"], "id": [1, 2, 3]}
    )
    (found,) = personal_data(rows_of({"train": raw}, Completions(), COLUMNS))
    assert found.rows == (1, 2, 3)
    assert written(raw, Completions(), COLUMNS, tmp_path).to_dict() == {
        "text": ["Whom to ask?"] * 2, "label": ["Ann, [EMAIL]", "Bob, [EMAIL]"], "id": [1, 2],
    }  # fmt: skip
    assert json.loads((tmp_path / "changes.json").read_text())["train"]["rows_redacted"] == [1, 2]


def test_a_chat_stays_one_with_each_message_its_own(tmp_path: Path) -> None:
    said = ["Hi.\n\nWrite to a@b.com", "", "Your phone:\n", "555-234-5678\nor c@d.org", "Bye"]
    clean_of = ["Hi.\n\nWrite to [EMAIL]", "", "Your phone:\n", "[PHONE]\nor [EMAIL]", "Bye"]
    roles = ["user", "assistant"] * 3
    chat, expected = (
        [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        for contents in (said, clean_of)
    )
    found = written(Dataset.from_dict({"chat": [chat]}), Chats(), Columns("chat", None), tmp_path)
    assert found["chat"][0] == expected


def test_labels_of_the_hub_are_written_by_name_in_lists_too(tmp_path: Path) -> None:
    raw = labelled([[1, 0], [], [1]], Sequence(ClassLabel(names=["no", "yes"])))
    assert written(raw, MultiLabels(), COLUMNS, tmp_path)["label"] == [["yes", "no"], [], ["yes"]]


def test_texts_with_tags_keep_their_words() -> None:
    rows = Rows(["write to a@b.com", "or not"], ["O O B", "O O"], "tags")
    assert plan({"train": rows})["train"].texts == {}


def test_findings_are_told_the_worst_first(tokenizer: PreTrainedTokenizerBase) -> None:
    splits = clean()
    planted = with_text(splits, "train", {1: "", 3: splits["train"].texts[4], 4: splits["test"].texts[1]})
    findings: list[Finding] = examine(planted, tokenizer, 5).findings
    order = [SEVERITIES.index(f.severity) for f in findings]
    assert order == sorted(order)
    assert findings[0].kind == "empty"
