"""Freezing schedules: which layers train when, and that nothing else of a training notices."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from foreign import BertInInit, Classifier, TrunkInSetup, make, trainer, vector_data
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_ft import GradualUnfreezing, InjectionError, TopLayers
from lightning_ft.injection import find_base

LAYERS = 4
BELOW = {  # in each library's own names: what trains when the top one or two of four layers do
    "bert": (lambda: tiny.bert_classifier(num_hidden_layers=LAYERS), r"bert\.encoder\.layer\.{}\.|bert\.pooler"),
    "gpt2": (lambda: tiny.gpt2(n_layer=LAYERS), r"transformer\.h\.{}\.|transformer\.ln_f"),
    "untied": (lambda: tiny.gpt2(n_layer=LAYERS, tie_word_embeddings=False), r"\.h\.{}\.|\.ln_f|lm_head"),
}


class Deep(BertInInit):
    """Four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny.bert_classifier(num_hidden_layers=LAYERS, num_labels=3)
        self.model.train()


def training(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def layers_of(names: set[str]) -> set[str]:
    """The layers, and what else of the base, that parameters are in: "0", "embeddings", "pooler"."""
    found = (re.search(r"bert\.(?:encoder\.layer\.(\d)|(\w+))", name) for name in names)
    return {match[1] or match[2] for match in found if match}


# ---------------------------------------------------------------------------------------------- the top layers


@pytest.mark.parametrize("case", BELOW)
def test_the_top_layers_what_follows_them_and_the_head_train(case: str) -> None:
    for k in [1, LAYERS]:
        build, pattern = BELOW[case]
        model = build()
        TopLayers(k).inject(model)
        top = "|".join(str(layer) for layer in range(LAYERS - k, LAYERS))
        pattern = pattern.replace("{}", f"({top})")
        assert training(model) == {n for n, _ in model.named_parameters() if re.search(f"{pattern}|classifier", n)}


def test_an_encoder_and_a_decoder_have_a_top_layer_each() -> None:
    config = {"num_layers": 4, "num_decoder_layers": 2}
    model = tiny.t5(**config)
    TopLayers(1).inject(model)
    pattern = r"encoder\.block\.3\.|decoder\.block\.1\.|(en|de)coder\.final_layer_norm"
    assert training(model) == {name for name, _ in model.named_parameters() if re.search(pattern, name)}


def test_modules_to_save_train_too() -> None:
    model = tiny.bert_classifier(num_hidden_layers=LAYERS)
    TopLayers(1, modules_to_save=["embeddings"]).inject(model)
    assert layers_of(training(model)) == {"3", "pooler", "embeddings"}


# -------------------------------------------------------------------------------------------------- step by step


class Watch(Callback):
    """What has a gradient, what moves and what has momentum, by epoch."""

    def __init__(self) -> None:
        self.graded: dict[int, set[str]] = {}
        self.moved: dict[int, set[str]] = {}
        self.momentum: dict[int, set[str]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        graded = {name for name, p in pl_module.named_parameters() if p.grad is not None}
        self.graded[trainer.current_epoch] = layers_of(graded)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        state = pl_module.state_dict()
        moved = {name for name, value in self.before.items() if not torch.equal(value, state[name])}
        self.moved[trainer.current_epoch] = layers_of(moved)
        (optimizer,) = trainer.optimizers
        stepped = {name for name, p in pl_module.named_parameters() if optimizer.state.get(p)}
        self.momentum[trainer.current_epoch] = layers_of(stepped)


class Saves(Callback):
    """At the end of every batch and of every epoch; listed first, before the method's own hooks have run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"epoch={trainer.current_epoch}.ckpt")


ALL = [{"3", "pooler"}, {"2", "3", "pooler"}, {"1", "2", "3", "pooler"}, {"0", "1", "2", "3", "pooler"}]
ALL += [ALL[-1] | {"embeddings"}] * 2
SCHEDULES = {
    "one each epoch": (GradualUnfreezing(), ALL),
    "every two": (GradualUnfreezing(every_n_epochs=2), [ALL[0], ALL[0], ALL[1], ALL[1], ALL[2], ALL[2]]),
    "from the second": (GradualUnfreezing(start=2), [*ALL[1:], ALL[-1]]),
    "up to three": (GradualUnfreezing(max_layers=3), [*ALL[:3], *[ALL[2]] * 3]),
    "all layers": (GradualUnfreezing(start=3, max_layers=LAYERS), [ALL[2], *[ALL[3]] * 5]),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_epoch_trains_its_layers_and_no_other(schedule: str) -> None:
    method, expected = SCHEDULES[schedule]
    watch, module = Watch(), make(Deep)
    trainer(method, watch, max_epochs=len(expected)).fit(module)
    by_epoch = dict(enumerate(expected))
    assert (watch.graded, watch.moved, watch.momentum) == (by_epoch, by_epoch, by_epoch)
    assert layers_of(training(module)) == (expected[-1] if method.max_layers else ALL[-1])


def test_every_parameter_is_in_the_optimizer_from_the_start_and_no_schedule_notices() -> None:
    module, run = make(TrunkInSetup), trainer(GradualUnfreezing(), max_epochs=4)  # LambdaLR, over the head alone
    run.fit(module)
    (optimizer,) = run.optimizers
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters())
    assert len(optimizer.param_groups) == 1


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("schedule", ["every two", "up to three"])
def test_a_resumed_fit_goes_on_with_the_same_layers(schedule: str, tmp_path: Path) -> None:
    method = SCHEDULES[schedule][0]

    def run(*callbacks: Callback, **more: Any) -> tuple[Deep, Watch]:
        module, watch = make(Deep), Watch()
        trainer(*callbacks, method, watch, max_epochs=4).fit(module, **more)
        return module, watch

    whole, watch = run(Saves(tmp_path))
    keys = {path.stem: set(torch.load(path)["state_dict"]) for path in tmp_path.glob("*.ckpt")}
    assert len(keys) == 4 + 12
    assert all(held == training(whole) for held in keys.values())  # the same at any moment
    torch.manual_seed(9)
    resumed, again = run(ckpt_path=tmp_path / "epoch=1.ckpt")
    assert again.graded == {epoch: watch.graded[epoch] for epoch in (2, 3)}
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    _, again = run(ckpt_path=tmp_path / "step=4.ckpt")  # the first of the second epoch's three
    assert again.graded == {epoch: watch.graded[epoch] for epoch in (1, 2, 3)}


@pytest.mark.parametrize("ends", [None, ZeroDivisionError])
def test_after_a_fit_nothing_waits(ends: type[Exception] | None) -> None:
    class Failing(Deep):
        def on_after_backward(self) -> None:
            if ends:
                raise ends

    module = make(Failing)
    if ends:
        with pytest.raises(ends):
            trainer(GradualUnfreezing(), max_epochs=1).fit(module)
    else:
        trainer(GradualUnfreezing(), max_epochs=1).fit(module)
    assert layers_of(training(module)) == ALL[-1]


class Stack(Classifier):
    """Plain torch with a BatchNorm in each layer."""

    data = staticmethod(lambda: vector_data(8))

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def outputs(self, x: Tensor) -> Tensor:
        for layer in self.body.layers:
            x = layer(x)
        return self.head(x)


def test_a_batchnorms_statistics_wait_with_its_layer() -> None:
    class Statistics(Callback):
        moved: list[list[bool]] = []  # noqa: RUF012

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.before = [layer[1].running_mean.clone() for layer in pl_module.body.layers]

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            now = [layer[1].running_mean for layer in pl_module.body.layers]
            self.moved.append([not torch.equal(a, b) for a, b in zip(now, self.before, strict=True)])

    statistics = Statistics()
    trainer(GradualUnfreezing(backbone="body"), statistics, max_epochs=3).fit(make(Stack))
    assert statistics.moved == [[False, False, True], [False, True, True], [True, True, True]]


def test_the_schedule_is_told(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        trainer(GradualUnfreezing(every_n_epochs=2, max_layers=2), max_epochs=4).fit(make(Deep))
    lines = [r.getMessage() for r in caplog.records if "GradualUnfreezing" in r.getMessage()]
    assert len(lines) == 3
    assert "1 top layer at first, one more each 2 epochs; in the end" in lines[0]
    shares = [float(re.search(r"\(([\d.]+)%\)", line)[1]) for line in lines]
    assert lines[1].startswith("GradualUnfreezing: epoch 0: ")
    assert lines[2].startswith("GradualUnfreezing: epoch 2: ")
    assert shares[1] < shares[2] == shares[0]


# ----------------------------------------------------------------------------------------- what is refused


def test_numbers_that_make_no_sense_are_refused() -> None:
    for kind, settings, says in [
        (TopLayers, {"k": 0}, "TopLayers: k must be a whole number of at least 1, not 0"),
        (TopLayers, {"k": 1.5}, "not 1.5"),
        (GradualUnfreezing, {"start": 0}, "start must be"),
        (GradualUnfreezing, {"every_n_epochs": -1}, "every_n_epochs must be"),
        (GradualUnfreezing, {"max_layers": "2"}, "max_layers must be"),
        (GradualUnfreezing, {"start": 3, "max_layers": 2}, "max_layers=2 is less than start=3"),
    ]:
        with pytest.raises(ValueError, match=says):
            kind(**settings)


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    for method, build, says in [
        (TopLayers(3), tiny.bert, "TopLayers: BertModel has 2 layers, not 3. FullFineTuning"),
        (GradualUnfreezing(3), tiny.bert, "GradualUnfreezing: BertModel has 2 layers, not 3"),
        (GradualUnfreezing(max_layers=3), tiny.bert, "has 2 layers, not 3"),
        (TopLayers(1, backbone="."), lambda: nn.Sequential(nn.Linear(2, 2)), "needs a stack of layers"),
    ]:
        model = build()
        with pytest.raises(InjectionError, match=says):
            method.inject(model)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_another_number_of_layers_needs_a_merge_between() -> None:
    model = tiny.bert()
    TopLayers(2).inject(model)
    before = training(model)
    for other in (TopLayers(1), GradualUnfreezing(1, max_layers=1)):
        with pytest.raises(InjectionError, match=r"encoder\.layer\.0.*[Mm]erge"):
            other.inject(model)
    assert training(model) == before
    assert find_base(model).root is model
