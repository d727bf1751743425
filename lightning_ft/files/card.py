"""The model card of a folder: its README.md, in the format of the Hugging Face hub.

Front matter that the hub reads, and a text for people. What it tells comes from the folder's own config and
from :class:`Facts`, plain values that whoever trained it adds. Paths of the machine are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypedDict

from huggingface_hub import EvalResult, ModelCardData

from lightning_ft import __version__

Library = Literal["peft", "lightning_ft", "transformers"]
"""What loads the folder: stock PEFT as well as lightning_ft, lightning_ft alone, or transformers as a model."""

FORMAT = "0.21"
"""The release of PEFT whose file format is written."""

TAG = "lightning_ft"
"""The tag on the hub of all that is made here."""


class Score(TypedDict, total=False):
    """A test score; ``before`` training it may be unknown."""

    type: str
    """The metric's id on the hub, e.g. ``"f1"``."""
    name: str
    """The metric for people, e.g. ``"macro F1"``."""
    before: float | None
    after: float


class Facts(TypedDict, total=False):
    """What a model card can tell beyond the folder's own config; whatever isn't known is left out."""

    base: str
    """The base: its name on the hub, or a folder, of which only the last part is told."""
    method: str
    settings: Mapping[str, Any]
    """The method's arguments."""
    parameters: int
    """Of the whole model."""
    trained: int
    """Of its parameters."""
    data: str
    """The name of the data: on the hub, or a file or folder, of which only the last part is told."""
    data_on_hub: bool
    rows: Mapping[str, int]
    """How many rows each split has."""
    labels: Sequence[str]
    """In the order of their ids."""
    head: Mapping[str, Any]
    """What the base is loaded with to have such a head, beside its labels: ``{"num_labels": 1}``."""
    reading: str
    """How the model's outputs are read, where it isn't by taking the largest."""
    template: str
    """How a language model's prompt and completion make a text: ``"{prompt} {completion}"``."""
    scores: Sequence[Score]
    training: Mapping[str, Any]
    """How it was trained, in words of the reader's: ``{"learning rate": 1e-3, "epochs": 3}``."""
    versions: Mapping[str, str]
    """Of the libraries it was trained with; by default those that are installed."""


_TASKS: dict[str, tuple[str, str | None]] = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
}
"""PEFT's task types, each with its class in transformers and its tag on the hub."""

_NO_SETTINGS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "task_type",
}  # fmt: skip
"""Fields of ``adapter_config.json`` that say what an adapter is for, and not how it was set."""


def pools_prompt(config: Mapping[str, Any]) -> bool:
    """Whether an adapter's predictions are other ones with stock PEFT, whose classifiers see the virtual tokens too.

    BERT's then pools the first of them; GPT-2's, which finds no padding in embedded tokens, the last position.
    """
    return config.get("task_type") == "SEQ_CLS" and config.get("peft_type") in ("PROMPT_TUNING", "P_TUNING")


def versions() -> dict[str, str]:
    """The versions of what an adapter is made with."""
    installed = {"lightning_ft": __version__}
    for name in ("torch", "transformers", "lightning"):
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def model_card(config: Mapping[str, Any], parameters: int, library: Library, facts: Facts | None = None) -> str:
    """The text of README.md.

    Args:
        config: the fields of ``adapter_config.json``; for a whole model those of its base alone.
        parameters: how many the folder holds.
        library: what loads all of the folder.
        facts: what is known beyond that.

    Raises:
        ValueError: if ``facts`` has a key that :class:`Facts` doesn't.
    """
    known: Facts = facts or {}
    unknown = set(known) - set(Facts.__annotations__)
    if unknown:
        raise ValueError(
            f"A model card has no place for {', '.join(sorted(unknown))}; it takes {', '.join(Facts.__annotations__)}."
        )
    base = known.get("base") or config.get("base_model_name_or_path")
    kinds = [fields["peft_type"] for fields in config.get("methods", [config]) if "peft_type" in fields]
    method = " ".join((known.get("method") or " and ".join(kinds) or "Fine-tune").split())
    auto_class, tag = _TASKS.get(config.get("task_type") or "", (None, None))
    over = _code(_last_part(base)) if base else "the model it was trained over"
    made_with = known.get("versions") or versions()
    sections = {
        "Method": {"method": method, "base": _last_part(base), **_settings(config, known)},
        "Data": _data(known),
        "Training": known.get("training") or {},
        "Versions": {**made_with, "file format": f"PEFT {FORMAT}"} if library == "peft" else made_with,
    }
    parts = [
        _front_matter([TAG, *(kind.lower() for kind in kinds)], method, base, tag, library, known),
        f"# {method} over {over}",
        f"Fine-tuned with lightning_ft. This folder holds {parameters:,} parameters{_share(known)}.",
        _scores(known.get("scores") or ()),
        "## Loading\n\n" + _loading(library, base, auto_class, known, pools_prompt(config)),
        _generating(library, base, known.get("template")) if auto_class == "AutoModelForCausalLM" else "",
        known.get("reading") or "",
        *(f"## {title}\n\n{_items(values)}" for title, values in sections.items() if values),
        "## Licence\n\nNone is named yet. Name one in the front matter (`license: ...`) before you share this; those of"
        " the base and of the data may bind you.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# ------------------------------------------------------------------------------------------- its sections


def _front_matter(
    tags: list[str], method: str, base: str | None, tag: str | None, library: Library, facts: Facts
) -> str:
    data = _last_part(facts.get("data"))
    on_hub = [data] if data and facts.get("data_on_hub") else None
    scores = list(facts.get("scores") or ()) if tag and data else []
    results = [
        EvalResult(
            task_type=str(tag),
            dataset_name=str(data),
            dataset_type=str(data) if on_hub else "custom",
            dataset_split="test",
            metric_type=score["type"],
            metric_name=score.get("name", score["type"]),
            metric_value=round(score["after"], 4),
        )
        for score in scores
    ]
    fields = ModelCardData(
        library_name=library,
        base_model=base if base and _is_on_hub(base) else None,
        pipeline_tag=tag,
        tags=tags,
        datasets=on_hub,
        metrics=list(dict.fromkeys(score["type"] for score in scores)) or None,
        model_name=f"{method} over {_last_part(base)}" if results else None,
        eval_results=results or None,
    )
    return f"---\n{fields.to_yaml()}\n---"


def _share(facts: Facts) -> str:
    if "trained" not in facts or "parameters" not in facts:
        return ""
    trained, total = facts["trained"], facts["parameters"]
    return f"; training changed {trained:,} of {total:,} ({trained / total:.2%})"


def _scores(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    rows = [(_cell(s.get("name", s["type"])), _number(s.get("before")), _number(s["after"])) for s in scores]
    return "\n".join(["| test | before | after |", "|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)])


def _loading(library: Library, base: str | None, auto_class: str | None, facts: Facts, pools: bool) -> str:
    here = '"path/of/this/folder"'
    if library == "transformers":
        name = auto_class or "AutoModel"
        return _python(
            f"from transformers import {name}, AutoTokenizer\n\n"
            f"model = {name}.from_pretrained({here})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({here})"
        )
    model = "model = ...  # the base that it was trained over, with the same head"
    if base and auto_class:
        source = _literal(_source(base))
        model = f"from transformers import {auto_class}\n\n"
        arguments = [source, *(f"{key}={_literal(value)}" for key, value in (facts.get("head") or {}).items())]
        if labels := facts.get("labels"):
            model += f"labels = {_literal(list(labels))}\n"
            arguments.insert(1, "id2label=dict(enumerate(labels))")
        unknown = auto_class.endswith("Classification") and len(arguments) == 1
        asked = "  # and num_labels=..., as in training" if unknown else ""
        model += f"model = {auto_class}.from_pretrained({', '.join(arguments)}){asked}"
    ours = f"import lightning_ft\n\nlightning_ft.load_adapter(model, {here})"
    theirs = f"from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, {here})"
    texts = ["First the base:", _python(model), "Then, with lightning_ft:", _python(ours)]
    if pools:
        texts += [
            "Stock PEFT loads it too, but its classifier pools virtual tokens or padding, and predicts otherwise."
        ]
    else:
        texts += ["or with stock PEFT:", _python(theirs)] if library == "peft" else ["Stock PEFT can't load it whole."]
    return "\n\n".join(texts)


def _generating(library: Library, base: str | None, template: str | None) -> str:
    folder = "path/of/this/folder" if library == "transformers" else _source(base or "base")
    prompt = (template or "{prompt}").partition("{completion}")[0].rstrip().replace("{prompt}", "Once upon a time")
    return "To complete a text:\n\n" + _python(
        "from transformers import AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({_literal(folder)})\n"
        f'inputs = tokenizer({_literal(prompt)}, return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"
    )


def _source(base: str) -> str:
    return base if _is_on_hub(base) else f"path/of/{_last_part(base)}"


def _settings(config: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    settings = dict(facts.get("settings") or {key: config[key] for key in sorted(config.keys() - _NO_SETTINGS)})
    for fields in settings.pop("methods", ()):
        settings |= {f"{fields['peft_type']} {key}": fields[key] for key in sorted(fields.keys() - _NO_SETTINGS)}
    off: tuple[Any, ...] = (None, "none", [])
    return {key: value for key, value in settings.items() if value is not False and value not in off}


def _data(facts: Facts) -> dict[str, Any]:
    rows = [f"{count:,} {split}" for split, count in (facts.get("rows") or {}).items()]
    told = {"data": _last_part(facts.get("data")), "rows": rows, "labels": list(facts.get("labels") or ())}
    told["template"] = facts.get("template")
    return {key: value for key, value in told.items() if value}


# ---------------------------------------------------------------------------- words that are safe in a text


def _is_on_hub(name: str) -> bool:
    """Whether ``name`` can be a name on the hub: one or two words, and no folder here."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None and not Path(name).exists()


def _last_part(name: str | None) -> str | None:
    return name if name is None or _is_on_hub(name) else re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def _code(value: Any) -> str:
    """Inline code: whatever is in it stays on its line and is shown as it is."""
    text = " ".join(str(value).split()) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def _cell(value: Any) -> str:
    return _code(value).replace("|", r"\|")


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # one line, whatever is in it


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


def _items(values: Mapping[str, Any]) -> str:
    told = {" ".join(str(key).split()): _told(value) for key, value in values.items() if value is not None}
    return "\n".join(f"- {key}: {value}" for key, value in told.items())


def _told(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = [_code(item) for item in value[:_SHOWN]]
        return ", ".join([*shown, *([f"… ({len(value)} in all)"] if len(value) > _SHOWN else [])])
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if type(value) is int else _code(value)


_SHOWN = 8
"""How many entries of a list are told."""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
