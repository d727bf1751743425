"""Parameter groups and schedules: against names, closed forms and those of transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
)

from lightning_ft import IA3, AdaLoRA, LoRA, PromptTuning
from lightning_ft.callbacks.finetuning import FineTuning
from lightning_ft.injection import injected_names
from lightning_ft.optim import (
    RateError,
    constant,
    cosine,
    inverse_sqrt,
    linear,
    one_cycle,
    parameter_groups,
    scale_rates,
    warmup_steps,
)


@pytest.fixture
def bert(tiny_bert_dir: str) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(tiny_bert_dir, num_labels=3)


def freeze(model: nn.Module, pattern: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not re.search(pattern, name)


# ---------------------------------------------------------------------- groups


@pytest.mark.parametrize("frozen", ["nothing", "bert", "layer.0|bias"])
def test_groups_partition_what_trains(bert: PreTrainedModel, frozen: str) -> None:
    for layer_decay in [1.0, 0.8]:
        freeze(bert, frozen)
        grouped = [id(p) for group in parameter_groups(bert, bert.bert, layer_decay) for p in group["params"]]
        assert len(set(grouped)) == len(grouped)
        assert set(grouped) == {id(p) for p in bert.parameters() if p.requires_grad}


def test_vectors_have_no_decay_and_matrices_the_optimizers(bert: PreTrainedModel) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(bert, bert.bert, 0.8), weight_decay=0.3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in bert.named_parameters():
        vector = name.endswith("bias") or "LayerNorm" in name
        assert decay[id(parameter)] == (0.0 if vector else 0.3), name


@pytest.mark.parametrize(
    ("method", "vectors"),
    [
        (IA3(), {"ia3_l"}),  # (n, 1) and (1, n), which start at one: decay would pull them to zero
        (LoRA(r=1, use_dora=True), {"lora_magnitude_vector"}),
        (LoRA(r=2, use_dora=True), {"lora_magnitude_vector"}),
        (AdaLoRA(init_r=2, target_r=1), {"lora_E"}),
        (PromptTuning(1), set()),
    ],
)
def test_what_is_added_decays_unless_it_is_a_vector_whatever_its_shape(
    bert: PreTrainedModel, method: FineTuning, vectors: set[str]
) -> None:
    method.inject(bert)
    groups = parameter_groups(bert, bert.bert)
    decays = {id(p): "weight_decay" not in group for group in groups for p in group["params"]}
    for name in injected_names(bert):
        assert decays[id(bert.get_parameter(name))] == (name.rpartition(".")[2] not in vectors), name


def expected_bert_rate(name: str, lr: float, d: float, layers: int = 2) -> float:
    """lr · d^(L + 1 - l): embeddings are layer 0; the pooler, after the last layer, goes with it."""
    if name.startswith("bert.embeddings"):
        layer = 0
    elif match := re.match(r"bert\.encoder\.layer\.(\d+)\.", name):
        layer = int(match[1]) + 1
    else:
        layer = layers if name.startswith("bert.") else layers + 1
    return lr * d ** (layers + 1 - layer)


def rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("d", [1.0, 0.9])
def test_layer_decay_gives_each_layer_its_rate(bert: PreTrainedModel, d: float) -> None:
    optimizer = scale_rates(torch.optim.AdamW(parameter_groups(bert, bert.bert, d), lr=1e-3))
    rate = rates(optimizer)
    for name, parameter in bert.named_parameters():
        assert rate[id(parameter)] == pytest.approx(expected_bert_rate(name, 1e-3, d)), name
    assert all("lr_scale" not in group for group in optimizer.param_groups)


@pytest.mark.parametrize("lora", [True, False], ids=["frozen for LoRA", "layers frozen"])
def test_what_trains_has_the_rate_of_its_layer_whatever_is_frozen(bert: PreTrainedModel, lora: bool) -> None:
    if lora:
        LoRA(r=2).inject(bert)
    else:
        freeze(bert, r"layer\.1|classifier")
    rate = rates(scale_rates(torch.optim.AdamW(parameter_groups(bert, bert.bert, 0.5), lr=1.0)))
    trained = {name: p for name, p in bert.named_parameters() if p.requires_grad}
    assert {id(p) for p in trained.values()} == set(rate)
    assert {rate[id(p)] for p in trained.values()} == ({0.25, 0.5, 1.0} if lora else {0.125, 0.25, 0.5})
    for name, parameter in trained.items():
        assert rate[id(parameter)] == pytest.approx(expected_bert_rate(name, 1.0, 0.5)), name


def test_decoders_norm_goes_with_the_last_layer() -> None:
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=3, n_head=2, num_labels=2)
    model = GPT2ForSequenceClassification(config)
    rate = rates(scale_rates(torch.optim.AdamW(parameter_groups(model, model.transformer, 0.5), lr=1.0)))
    layer = {"transformer.wte": 0, "transformer.wpe": 0, "transformer.ln_f": 3, "score": 4}
    layer |= {f"transformer.h.{i}": i + 1 for i in range(3)}
    for name, parameter in model.named_parameters():
        found = next(value for key, value in layer.items() if name.startswith(f"{key}."))
        assert rate[id(parameter)] == 0.5 ** (4 - found), name


@pytest.mark.parametrize("lora", [True, False], ids=["frozen for LoRA", "all trains"])
@pytest.mark.parametrize("d", [1.0, 0.5])
def test_head_has_the_ratio_of_the_bases_rate_and_the_base_its_own(bert: PreTrainedModel, d: float, lora: bool) -> None:
    if lora:
        LoRA(r=2).inject(bert)
    optimizer = scale_rates(torch.optim.AdamW(parameter_groups(bert, bert.bert, d, head_lr_ratio=10.0), lr=1e-3))
    rate = rates(optimizer)
    for name, parameter in bert.named_parameters():
        if parameter.requires_grad:
            expected = expected_bert_rate(name, 1e-3, d) if name.startswith("bert.") else 1e-2
            assert rate[id(parameter)] == pytest.approx(expected), name
    assert {g["name"] for g in optimizer.param_groups} >= {"head", "head_no_decay"} | ({"base"} if d == 1 else set())


@pytest.mark.parametrize("ratio", [0.0, -1.0])
def test_head_lr_ratio_out_of_range_is_refused(bert: PreTrainedModel, ratio: float) -> None:
    with pytest.raises(RateError, match=f"head_lr_ratio.*{ratio}"):
        parameter_groups(bert, bert.bert, 1.0, ratio)


@pytest.mark.parametrize("layer_decay", [0.0, 1.1])
def test_layer_decay_out_of_range_is_refused(bert: PreTrainedModel, layer_decay: float) -> None:
    with pytest.raises(ValueError, match=f"layer_decay.*{layer_decay}"):
        parameter_groups(bert, bert.bert, layer_decay)


def test_layer_decay_needs_a_stack_of_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert len(parameter_groups(model, model)) == 2
    with pytest.raises(ValueError, match=r"layer_decay.*ModuleList.*Sequential"):
        parameter_groups(model, model, 0.9)


# ---------------------------------------------------------------------- schedules

Schedule = Callable[..., torch.optim.lr_scheduler.LambdaLR]


def progress(step: int, total: int, warm: int) -> float:
    return (step - warm) / max(1, total - warm)


CLOSED_FORMS: dict[Schedule, Callable[[int, int, int], float]] = {
    linear: lambda step, total, warm: 1 - progress(step, total, warm),
    cosine: lambda step, total, warm: (1 + math.cos(math.pi * progress(step, total, warm))) / 2,
    constant: lambda step, total, warm: 1.0,
    inverse_sqrt: lambda step, total, warm: math.sqrt((warm or 10_000) / (step - warm + (warm or 10_000))),
}


@pytest.mark.parametrize("schedule", CLOSED_FORMS)
def test_schedule_is_its_closed_form_at_every_step(schedule: Schedule) -> None:
    for warmup, warm in [(0, 0), (0.25, 5), (19, 19)]:
        total, base = 20, (1e-3, 0.5)
        optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in base])
        scheduler = schedule(optimizer, total, warmup)
        for step in range(total + 1):
            factor = step / warm if step < warm else CLOSED_FORMS[schedule](step, total, warm)
            assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr * factor for lr in base])
            optimizer.step()
            scheduler.step()


REFERENCES: dict[Schedule, Callable[[torch.optim.Optimizer, int, int], torch.optim.lr_scheduler.LambdaLR]] = {
    linear: lambda optimizer, warm, total: get_linear_schedule_with_warmup(optimizer, warm, total),
    cosine: lambda optimizer, warm, total: get_cosine_schedule_with_warmup(optimizer, warm, total),
    constant: lambda optimizer, warm, total: get_constant_schedule_with_warmup(optimizer, warm),
    inverse_sqrt: lambda optimizer, warm, total: get_inverse_sqrt_schedule(optimizer, warm),
}


@pytest.mark.parametrize("schedule", REFERENCES)
@pytest.mark.parametrize("warm", [0, 1, 7, 20])
def test_schedule_is_that_of_transformers(schedule: Schedule, warm: int) -> None:
    ours, theirs = (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0) for _ in range(2))
    both = schedule(ours, 20, float(warm)), REFERENCES[schedule](theirs, warm, 20)
    for _ in range(20):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])
        for optimizer, scheduler in zip((ours, theirs), both, strict=True):
            optimizer.step()
            scheduler.step()


def test_inverse_sqrt_has_a_timescale_of_its_own_where_one_is_given() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = inverse_sqrt(optimizer, 100, warmup=0, timescale=4)
    for step in range(20):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(math.sqrt(4 / (step + 4)))
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("warmup", "warm"), [(0.25, 5), (7, 7), (0, 2), (1, 2)])
def test_one_cycle_is_two_halves_of_a_cosine_for_each_group(warmup: float, warm: int) -> None:
    total, base = 20, (1e-3, 0.5)
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in base])
    scheduler = one_cycle(optimizer, total, warmup, div_factor=10.0, final_div_factor=100.0)

    def between(start: float, end: float, share: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    for step in range(total):
        if step < warm:
            factor, beta = (between(*ends, step / (warm - 1)) for ends in ((0.1, 1), (0.95, 0.85)))
        else:
            share = (step - (warm - 1)) / (total - warm)
            factor, beta = (between(*ends, share) for ends in ((1, 0.001), (0.85, 0.95)))
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr * factor for lr in base])
        assert [group["betas"][0] for group in optimizer.param_groups] == pytest.approx([beta, beta])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("total", "warmup"), [(2, 0.0), (10, 10)])
def test_one_cycle_needs_steps_to_fall_in(total: int, warmup: float) -> None:
    with pytest.raises(RateError, match="must fall after that"):
        one_cycle(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), total, warmup)


def test_warmup_is_a_share_below_one_and_steps_from_there() -> None:
    asked = [(0, 10), (0.06, 100), (0.5, 7), (1, 10), (7.0, 10), (10, 10)]
    assert [warmup_steps(warmup, total) for warmup, total in asked] == [0, 6, 4, 1, 7, 10]


@pytest.mark.parametrize(
    ("warmup", "says"), [(-0.1, "warmup.*-0.1"), (1.5, "warmup.*1.5"), (11, "warmup=11 steps.*10 steps")]
)
def test_warmup_that_makes_no_sense_is_refused(warmup: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        warmup_steps(warmup, 10)
