"""BitFit and LayerNorm tuning: which parameters of which architectures train, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import tiny
from foreign import CNN, TorchTransformer
from torch import nn

from lightning_ft import BitFit, InjectionError, LayerNormTuning, LoRA
from lightning_ft.callbacks.finetuning import FineTuning
from lightning_ft.injection import find_base


def trained(method: FineTuning, model: nn.Module) -> set[str]:
    """The parameters of the base that train."""
    method.inject(model)
    base = find_base(model, method.backbone)
    return {name for name, parameter in base.named_parameters() if parameter.requires_grad}


def named(pattern: str, model: nn.Module, backbone: str | None = None) -> set[str]:
    return {name for name, _ in find_base(model, backbone).named_parameters() if re.search(pattern, name)}


# In each library's own names; the patterns name nothing else of these models.
BIASES: dict[str, tuple[Callable[[], Any], str, str | None]] = {
    "bert": (tiny.bert_classifier, r"\.bias$", None),
    "gpt2": (tiny.gpt2, r"\.bias$", None),
    "torch": (TorchTransformer, r"\.(in_proj_)?bias$", "encoder"),
    "convolutions": (CNN, r"\.bias$", "body"),
    "recurrent": (lambda: nn.Sequential(nn.LSTM(3, 4, bidirectional=True)), r"\.bias_[ih]h_", "."),
}
NORMS: dict[str, tuple[Callable[[], Any], str, str | None]] = {
    "bert": (tiny.bert_classifier, r"LayerNorm\.(weight|bias)$", None),
    "gpt2": (tiny.gpt2, r"ln_(1|2|f)\.(weight|bias)$", None),
    "llama": (tiny.llama, r"norm\.weight$", None),
    "t5": (tiny.t5, r"layer_norm\.weight$", None),
    "torch": (TorchTransformer, r"norm[12]\.(weight|bias)$", "encoder"),
    "groups, not batches": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.LayerNorm(4, bias=False)),
        r"^(1\.weight|1\.bias|3\.weight)$",
        ".",
    ),
}


@pytest.mark.parametrize(
    ("method", "case"), [*((BitFit, case) for case in BIASES.values()), *((LayerNormTuning, c) for c in NORMS.values())]
)
def test_all_of_them_train_and_nothing_else_of_the_base(
    method: type[FineTuning], case: tuple[Callable[[], Any], str, str | None]
) -> None:
    build, pattern, backbone = case
    expected = named(pattern, build(), backbone)
    assert expected
    assert trained(method(backbone=backbone), build()) == expected


def test_the_papers_subset_of_biases() -> None:
    """Section 3: of the queries, and of the second MLP layer, as the paper numbers them."""
    pattern = r"(query|intermediate\.dense)\.bias$"
    found = trained(BitFit(["query", "intermediate.dense"]), tiny.bert_classifier())
    assert found == named(pattern, tiny.bert_classifier())


def test_which_modules_can_be_said() -> None:
    for method, pattern in [
        (BitFit("all-linear"), r"(query|key|value|dense)\.bias$"),
        (BitFit(exclude_modules=["LayerNorm"]), r"(query|key|value|dense)\.bias$"),
        (BitFit(["key"], modules_to_save=["pooler"]), r"key\.bias$|pooler"),
        (LayerNormTuning(r".*attention.*Norm"), r"attention\.output\.LayerNorm"),
        (LayerNormTuning(exclude_modules=["embeddings.LayerNorm"]), r"output\.LayerNorm"),
        (LayerNormTuning(modules_to_save=["embeddings"]), r"LayerNorm|embeddings\."),
    ]:
        assert trained(method, tiny.bert_classifier()) == named(pattern, tiny.bert_classifier())


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    for method, build, says in [
        (BitFit(), tiny.llama, "LlamaModel has no biases that BitFit could train. LayerNormTuning and IA3"),
        (BitFit(), tiny.t5, "T5ForConditionalGeneration has no biases"),  # relative_attention_bias is an embedding
        (BitFit(["word_embeddings"]), tiny.bert, r"can't adapt \(Embedding\)"),
        (BitFit(["qery"]), tiny.bert, "'qery' matches no module. Near names: query"),
        (LayerNormTuning(backbone="."), lambda: nn.Sequential(nn.Linear(2, 2)), "Sequential has no layer, RMS or"),
        (LayerNormTuning(["query"]), tiny.bert, r"can't adapt \(Linear\)"),
    ]:
        model = build()
        with pytest.raises(InjectionError, match=says):
            method.inject(model)
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "one", "other"), [(BitFit, "query", "key"), (LayerNormTuning, "layer.0.*Norm", "layer.1.*Norm")]
)
def test_a_second_injection_with_other_targets_is_an_error(kind: Any, one: str, other: str) -> None:
    model = tiny.bert()
    found = trained(kind(f".*{one}.*"), model)
    with pytest.raises(InjectionError, match=rf"{kind.__name__} trained other.*{other}.* new, .*{one}.* left out"):
        kind(f".*{other}.*").inject(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == found


def test_what_lora_added_is_no_bias_of_the_base() -> None:
    model = tiny.bert()
    LoRA(r=2, target_modules="all-linear").inject(model)
    assert trained(BitFit(), model) == named(r"\.bias$|\.lora_[AB]$", model)
