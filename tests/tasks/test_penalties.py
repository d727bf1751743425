"""Penalties: each against its formula, and in a fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from foreign import trainer as make_trainer
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel

import lightning_ft
from lightning_ft import (
    EWC,
    IA3,
    KL,
    L2,
    L2SP,
    Adapter,
    BitFit,
    Classification,
    FineTuner,
    LoRA,
    PromptTuning,
    Replay,
    TopLayers,
)
from lightning_ft.apps.paths import conf_dir
from lightning_ft.general import collate, embed, encode, hidden_states, watching
from lightning_ft.injection import InjectionError, Origin, find_base, injected_names
from lightning_ft.methods.adalora import AdaLoRA
from lightning_ft.tasks.penalties.ewc import fisher
from lightning_ft.tasks.penalties.kl import token_kl
from lightning_ft.tasks.penalties.penalty import Ground, Penalty, Step

NAMES = ["bad", "fair", "good"]
TEXTS = ["the battery is good", "it broke", "not bad and not great", "it works", "the it was awful", "very very good"]
ALL: dict[str, Callable[..., Penalty]] = {
    "l2": L2, "l2_sp": L2SP, "kl": KL,
    "ewc": partial(EWC, texts=TEXTS), "replay": partial(Replay, texts=TEXTS, share=0.5),
}  # fmt: skip
LAYERS = {
    "lora": LoRA(r=2, alpha=3, target_modules="all-linear"),
    "dora": LoRA(r=2, use_dora=True),
    "pissa": LoRA(r=2, init_lora_weights="pissa"),
    "biases": LoRA(r=2, bias="all"),
    "adalora": AdaLoRA(init_r=3, target_r=2),
    "ia3": IA3(),
}


def make_rows(count: int) -> list[dict[str, Tensor]]:
    """Rows of six tokens, the last two of them padding in every third row."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(5, 60, (count, 6), generator=generator)
    mask = torch.ones_like(tokens)
    mask[::3, 4:] = 0
    columns = {"input_ids": tokens, "attention_mask": mask, "labels": torch.arange(count) % len(NAMES)}
    return [{key: column[i] for key, column in columns.items()} for i in range(count)]


def loader() -> DataLoader[Any]:
    return DataLoader(make_rows(14), batch_size=4)


def make_module(name: str, penalties: Sequence[Penalty] = (), lr: float = 5e-3) -> FineTuner:
    """The same weights each time, and no dropout."""
    torch.manual_seed(3)
    module = FineTuner(name, Classification(NAMES), partial(torch.optim.AdamW, lr=lr), penalties=penalties)
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return module


def number(value: Tensor | float) -> float:
    """Without torch's warning of what has gradients."""
    return float(value.detach()) if isinstance(value, Tensor) else value


def disturb(model: nn.Module, scale: float = 0.1) -> None:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def step_of(model: nn.Module, inputs: dict[str, Tensor], index: int = 0) -> Step:
    with watching(model) as seen:
        model(**inputs)
    return Step(inputs, index, seen.hidden, seen.logits)


def batch_of(rows: int = 4) -> dict[str, Tensor]:
    some = make_rows(rows)
    return {key: torch.stack([row[key] for row in some]) for key in ("input_ids", "attention_mask")}


def lm() -> Any:
    return tiny.llama_lm(vocab_size=100)


# ------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", LAYERS)
def test_l2_sp_is_that_of_the_merged_weights_and_so_are_its_gradients(name: str) -> None:
    model = tiny.bert_classifier().double()
    before = {key: value.detach().clone() for key, value in model.bert.named_parameters(prefix="bert")}
    copy.copy(LAYERS[name]).inject(model)
    model.double()
    ground = Ground(model)
    disturb(model)
    own = [p for key, p in model.named_parameters() if p.requires_grad and not key.startswith("classifier")]
    penalty = L2SP(1.0)
    penalty.prepare(ground)
    value = penalty(ground, step_of(model, {"input_ids": tiny.TOKENS}))
    gradients = torch.autograd.grad(value, own, allow_unused=True)

    merged = copy.deepcopy(model)
    lightning_ft.merge(merged)
    after = dict(merged.bert.named_parameters(prefix="bert"))
    expected = 0.5 * sum(number((after[key] - before[key]).square().sum()) for key in before)
    assert number(value) == pytest.approx(expected, rel=1e-12)

    written = {key: now for key, now, _ in ground.origin.changes(ground.base)}
    explicit = 0.5 * sum((now - before[key]).square().sum() for key, now in written.items())  # by autograd alone
    for ours, theirs in zip(gradients, torch.autograd.grad(explicit, own, allow_unused=True), strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert sum(gradient is not None and bool(gradient.abs().max() > 0) for gradient in gradients) > 1


def test_l2_sp_of_full_fine_tuning_is_the_distance_from_the_start_and_that_of_the_head() -> None:
    model = tiny.bert_classifier()
    ground = Ground(model)
    before = {key: value.clone() for key, value in model.named_parameters()}
    disturb(model)
    squares = {
        key: number(((value - before[key]) if key.startswith("bert") else value).square().sum())
        for key, value in model.named_parameters()
    }
    step = step_of(model, {"input_ids": tiny.TOKENS})
    base, head = (sum(v for k, v in squares.items() if k.startswith("bert") == of_base) for of_base in (True, False))
    assert number(L2SP(1.0)(ground, step)) == pytest.approx(0.5 * base, rel=1e-5)
    assert number(L2SP(1.0, head=0.3)(ground, step)) == pytest.approx(0.5 * base + 0.15 * head, rel=1e-5)
    everything = sum(number(parameter.square().sum()) for parameter in model.parameters())
    assert number(L2(1.0)(ground, step)) == pytest.approx(0.5 * everything, rel=1e-5)


@pytest.mark.parametrize("kind", [L2SP, partial(EWC, texts=TEXTS)])
@pytest.mark.parametrize("method", [Adapter(bottleneck=2), PromptTuning(num_virtual_tokens=2)])
def test_what_changes_no_weights_is_refused_with_the_way_out(kind: Any, method: Any, tiny_bert_dir: str) -> None:
    module = make_module(tiny_bert_dir, [kind(1.0)])
    with pytest.raises(InjectionError, match=r"compares weights.*KL, Replay"):
        make_trainer(copy.copy(method)).fit(module, loader())


@pytest.mark.parametrize("causal", [False, True])
def test_fisher_is_that_of_a_naive_loop(causal: bool, tiny_bert_dir: str) -> None:
    model = lm() if causal else tiny.bert_classifier(vocab_size=100)
    rows = encode(TEXTS[:3], model, tiny_bert_dir, 16)
    name = "model.layers.0.mlp.up_proj.weight" if causal else "bert.encoder.layer.0.intermediate.dense.weight"
    found = fisher(model, [name], rows, causal, seed=4)[name]

    generator, parameter = torch.Generator().manual_seed(4), model.get_parameter(name)
    expected = torch.zeros_like(parameter)
    for row in rows:
        batch = collate([row], torch.device("cpu"))
        if causal:
            logits = model(**batch).logits[0]
            drawn = torch.multinomial(logits.softmax(-1).detach(), 1, generator=generator)[:, 0]
            gradient = sum(
                torch.autograd.grad(logits[t].log_softmax(-1)[drawn[t]], parameter, retain_graph=True)[0]
                for t in range(len(drawn))
            )
            expected += gradient**2 / len(drawn) / len(rows)
        else:
            states = model.bert(**batch).last_hidden_state[0].mean(0)
            e = states / states.norm()
            v = torch.randn(len(e), generator=generator)
            jacobian = [torch.autograd.grad(value, parameter, retain_graph=True)[0] for value in e]
            expected += sum(v_j * row_j for v_j, row_j in zip(v, jacobian, strict=True)) ** 2 / len(rows)
    assert expected.max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)


def test_ewc_weighs_each_change_by_the_fisher_of_the_bare_base(tiny_bert_dir: str) -> None:
    module = make_module(tiny_bert_dir)
    bare = copy.deepcopy(module.model).eval()
    LoRA(r=2).inject(module.model)
    disturb(module.model)  # F is none of the tuned model's
    ground, penalty = Ground(module.model), EWC(1.0, TEXTS, seed=2)
    penalty.prepare(ground)
    rows = encode(TEXTS, bare, None, 128)
    names = [name for name, _, _ in ground.origin.changes(ground.base)]
    expected = fisher(bare, names, rows, False, seed=2)
    total = sum((expected[k] * (now - before) ** 2).sum() for k, now, before in ground.origin.changes(ground.base))
    value = penalty(ground, step_of(module.model, batch_of()))
    assert len(names) == 4
    assert number(value) == pytest.approx(0.5 * number(total), rel=1e-4)
    value.backward()
    assert all(p.grad is not None for key, p in module.model.named_parameters() if "lora" in key)


# ------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    "method", [None, LoRA(r=2), Adapter(bottleneck=2), TopLayers(k=1), PromptTuning(num_virtual_tokens=2)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_the_teacher_is_the_bare_base_whatever_was_trained(method: Any, causal: bool) -> None:
    model = lm() if causal else tiny.bert_classifier(vocab_size=100)
    original, inputs = copy.deepcopy(model), batch_of()
    if method is not None:
        copy.copy(method).inject(model)
    ground = Ground(model)
    disturb(model)
    with torch.no_grad():
        if causal:
            assert torch.equal(ground.bare(**inputs).logits, original(**inputs).logits)
        assert torch.equal(hidden_states(ground.bare, inputs), hidden_states(original, inputs))
        assert not torch.equal(hidden_states(model, inputs), hidden_states(original, inputs))
    assert not any(layer.training for layer in ground.bare.modules())


@pytest.mark.parametrize("causal", [False, True])
def test_kl_is_zero_at_the_start_and_the_divergence_afterwards(causal: bool) -> None:
    model = lm() if causal else tiny.bert_classifier(vocab_size=100)
    original, inputs = copy.deepcopy(model), batch_of()
    LoRA(r=2).inject(model)
    ground, penalty = Ground(model), KL(1.0)
    assert number(penalty(ground, step_of(model, inputs))) == pytest.approx(0, abs=1e-12)
    disturb(model, 0.5)
    value = penalty(ground, step_of(model, inputs))
    with torch.no_grad():
        if causal:
            p, q = (m(**inputs).logits.log_softmax(-1) for m in (original, model))
            divergences = [
                number((p[i, t].exp() * (p[i, t] - q[i, t])).sum())
                for i, t in inputs["attention_mask"].nonzero().tolist()
            ]
        else:
            pairs = [
                [m.bert(**inputs).last_hidden_state[i][inputs["attention_mask"][i].bool()].mean(0) for i in range(4)]
                for m in (original, model)
            ]
            divergences = [1 - number(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(*pairs, strict=True)]
    assert number(value) == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)
    assert number(value) > 1e-4
    value.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for k, p in model.named_parameters() if "lora" in k)


def test_token_kl_is_torchs() -> None:
    base, tuned = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    theirs = nn.functional.kl_div(tuned.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
    torch.testing.assert_close(token_kl(base, tuned), theirs)


def test_replay_takes_its_share_and_in_each_step_other_texts() -> None:
    for share, rows, count in ((0.2, 32, 8), (0.5, 10, 10), (0.1, 9, 1), (0.01, 4, 1), (0.9, 10, 90)):
        replay = Replay(1.0, share=share)
        replay._rows = [{}] * 200
        assert len(set(replay.chosen(rows, 0))) == count
    assert replay.chosen(10, 3) == replay.chosen(10, 3) != replay.chosen(10, 4)
    few = Replay(1.0, share=0.5)
    few._rows = [{}] * 3
    assert sorted(few.chosen(10, 0)) == [0, 1, 2]


@pytest.mark.parametrize("causal", [False, True])
def test_replay_learns_general_text_or_keeps_its_embeddings(causal: bool, tiny_bert_dir: str) -> None:
    model = lm() if causal else tiny.bert_classifier(vocab_size=100)
    original = copy.deepcopy(model)
    LoRA(r=2).inject(model)
    ground, replay = Ground(model), Replay(1.0, TEXTS, share=0.5, tokenizer=tiny_bert_dir)
    replay.prepare(ground)
    step = step_of(model, batch_of(4), index=2)
    if not causal:
        assert number(replay(ground, step)) == pytest.approx(0, abs=1e-12)
    disturb(model, 0.5)
    value = replay(ground, step)
    rows = [replay._rows[i] for i in replay.chosen(4, 2)]
    if causal:  # the loss of Hugging Face's own, text by text
        parts = [(collate([row], torch.device("cpu")), len(row["input_ids"]) - 1) for row in rows]
        losses = [number(model(**batch, labels=batch["input_ids"]).loss) * count for batch, count in parts]
        assert number(value) == pytest.approx(sum(losses) / sum(count for _, count in parts), rel=1e-5)
    else:
        batches = [collate([row], torch.device("cpu")) for row in rows]
        pairs = [[embed(hidden_states(m, b), b["attention_mask"])[0] for m in (original, model)] for b in batches]
        assert number(value) == pytest.approx(sum(1 - number(a @ b) for a, b in pairs) / len(pairs), rel=1e-3)


# ---------------------------------------------------------------------------------------- a fit


def methods_of(method: Any) -> list[Any]:
    return [] if method is None else [copy.copy(method)]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def fitted(name: str, penalties: Sequence[Penalty], method: Any = None, **options: Any) -> FineTuner:
    module = make_module(name, penalties)
    make_trainer(*methods_of(method), **options).fit(module, loader())
    return module


def test_a_weight_of_zero_changes_nothing_and_any_other_does(tiny_bert_dir: str) -> None:
    without = fitted(tiny_bert_dir, [], LoRA(r=2))
    assert same(state(without), state(fitted(tiny_bert_dir, [kind(0.0) for kind in ALL.values()], LoRA(r=2))))
    for kind in ALL.values():
        assert not same(state(without), state(fitted(tiny_bert_dir, [kind(10.0)], LoRA(r=2))))


@pytest.mark.parametrize("method", [None, LoRA(r=2)], ids=["full", "lora"])
def test_each_penalty_alone_and_all_together_keep_what_they_say(tiny_bert_dir: str, method: Any) -> None:
    """The logged terms add up to the loss, and a larger weight leaves less of what it is the weight of."""
    every = make_module(tiny_bert_dir, [kind(0.1) for kind in ALL.values()])
    trainer = make_trainer(*methods_of(method), max_epochs=1)
    trainer.fit(every, loader())
    logged = {key: number(value) for key, value in trainer.callback_metrics.items()}
    assert set(logged) == {"train/loss", "train/task_loss", *(f"train/penalty/{name}" for name in ALL)}
    terms = sum(value for key, value in logged.items() if "penalty" in key) + logged["train/task_loss"]
    assert logged["train/loss"] == pytest.approx(terms, rel=1e-5)

    def moved(module: FineTuner) -> float:
        rows = encode(TEXTS, module.model, tiny_bert_dir, 16)
        batch = collate(rows, torch.device("cpu"))
        bare = AutoModel.from_pretrained(tiny_bert_dir).eval()
        module.eval()
        with torch.no_grad():
            pair = [embed(hidden_states(m, batch), batch["attention_mask"]) for m in (bare, module.model)]
        return number((pair[0] - pair[1]).square().sum())

    free = moved(fitted(tiny_bert_dir, [], method))
    for name, weight in {"l2_sp": 10.0, "kl": 100.0, "ewc": 1000.0, "replay": 100.0}.items():
        assert moved(fitted(tiny_bert_dir, [ALL[name](weight)], method)) < 0.5 * free, name


@pytest.mark.parametrize("method", [None, LoRA(r=2), BitFit()], ids=["full", "lora", "bitfit"])
def test_a_resumed_fit_is_the_uninterrupted_one_and_its_checkpoint_no_larger(
    tiny_bert_dir: str, tmp_path: Path, method: Any
) -> None:
    def penalties() -> list[Penalty]:
        return [kind(0.5) for kind in ALL.values()]

    whole = fitted(tiny_bert_dir, penalties(), method, max_steps=6, max_epochs=-1)
    saving = [ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=4)]
    first = make_module(tiny_bert_dir, penalties())
    make_trainer(*methods_of(method), *saving, enable_checkpointing=True, max_steps=4, max_epochs=-1).fit(
        first, loader()
    )
    keys = torch.load(tmp_path / "x.ckpt", weights_only=False)["state_dict"].keys()
    bare = fitted(tiny_bert_dir, [], method, max_steps=1)
    trained = {key for key, p in bare.named_parameters() if p.requires_grad}
    assert keys - bare.state_dict().keys() == set()
    assert not method or keys == trained

    second = make_module(tiny_bert_dir, penalties())
    saving = [ModelCheckpoint(tmp_path, filename="y", every_n_train_steps=4)]
    again = make_trainer(*methods_of(method), *saving, enable_checkpointing=True, max_steps=6, max_epochs=-1)
    again.fit(second, loader(), ckpt_path=tmp_path / "x.ckpt", weights_only=False)
    assert same(state(whole), state(second))


def test_a_second_fit_still_compares_with_the_base(tiny_bert_dir: str) -> None:
    module = make_module(tiny_bert_dir, [L2SP(0.1)])
    before = state(module)
    for _ in range(2):
        make_trainer(max_epochs=1).fit(module, loader())
    base = find_base(module.model)
    for name, _, start in module._origin.changes(base):
        assert torch.equal(start, before[f"model.{name}"])


def test_after_a_fit_nothing_of_it_is_left_on_the_module(tiny_bert_dir: str) -> None:
    module = fitted(tiny_bert_dir, [kind(0.1) for kind in ALL.values()], LoRA(r=2))
    assert module._ground is None
    assert not any(layer._forward_hooks for layer in module.modules())
    assert injected_names(module) == injected_names(copy.deepcopy(module))


def test_what_makes_no_sense_is_refused(tiny_bert_dir: str) -> None:
    with pytest.raises(ValueError, match="each penalty once"):
        make_module(tiny_bert_dir, [KL(1.0), KL(2.0)])
    for wrong in (lambda: KL(-1.0), lambda: Replay(1.0, share=1.0), lambda: EWC(1.0, samples=0)):
        with pytest.raises(ValueError, match="must be"):
            wrong()


def test_a_plain_lightning_module_can_have_them_too(tiny_bert_dir: str) -> None:
    """With a causal language model in it."""

    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.lm = lm().train()
            self.penalties = [KL(1.0), L2SP(1.0)]

        def on_fit_start(self) -> None:
            self.ground = Ground(self.lm)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            with watching(self.lm) as seen:
                loss = self.lm(**inputs, labels=inputs["input_ids"]).loss
            step = Step(inputs, batch_idx, seen.hidden, seen.logits)
            return loss + sum(p.weight * p(self.ground, step) for p in self.penalties)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Plain()
    before = state(module)
    make_trainer(LoRA(r=2), max_epochs=1).fit(module, loader())
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())


def test_the_origin_copies_only_what_trains() -> None:
    model = tiny.bert_classifier()
    LoRA(r=2).inject(model)
    origin = Origin()
    origin.remember(find_base(model))
    assert origin.values(find_base(model)) == {}


# ------------------------------------------------------------------------------------- the config


def test_each_config_is_a_constructor_call_and_several_go_together() -> None:
    groups = sorted(path.stem for path in (conf_dir() / "regularizer").glob("*.yaml"))
    assert groups == sorted([*ALL, "none"])
    kinds = {"l2": L2, "l2_sp": L2SP, "ewc": EWC, "kl": KL, "replay": Replay}
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        assert compose("train").regularizer == {}
        for name, kind in kinds.items():
            config = compose("train", [f"regularizer={name}", f"regularizer.{name}.weight=0.25"]).regularizer
            (penalty,) = instantiate(config, _convert_="all").values()
            assert (type(penalty), penalty.weight) == (kind, 0.25)
        both = compose("train", ["regularizer=[l2_sp,kl]"]).regularizer
    assert [type(penalty) for penalty in instantiate(both, _convert_="all").values()] == [L2SP, KL]
