"""TrunkCache: the same training as without it, with one pass through what is frozen; and what it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
import torch.nn.functional as F
from foreign import CNN, TrunkInSetup, make, trainer
from lightning.pytorch.callbacks import LearningRateFinder
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ft import (
    Averaging,
    BitFit,
    Compile,
    GradientCheckpointing,
    GradualUnfreezing,
    HeadOnly,
    InjectionError,
    LoRA,
    PromptTuning,
    TopLayers,
    TrunkCache,
)
from lightning_ft.callbacks.row_store import RowStore, rows_of
from lightning_ft.errors import UserError
from lightning_ft.injection import Origin, find_base

LAYERS, ROWS, BATCH = 3, 16, 4
DROPS = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}

STACKS = {"bert": "bert.encoder.layer", "distilbert": "distilbert.transformer.layer", "llama": "model.layers"}


def model(kind: str) -> Any:
    if kind == "bert":
        return tiny.bert_classifier(num_hidden_layers=LAYERS, **DROPS)
    if kind == "distilbert":
        return tiny.distilbert_classifier(n_layers=LAYERS, dropout=0.2, attention_dropout=0.2)
    return tiny.llama_lm(num_hidden_layers=LAYERS, attention_dropout=0.2)


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 9, (ROWS,), generator=generator).tolist()
    return [torch.randint(1, 50, (length,), generator=generator) for length in lengths]


class Texts(L.LightningModule):
    """Rows of different lengths in a new order every epoch, padded by a little more than they need."""

    def __init__(self, kind: str = "bert", net: Any = None, left: bool = False) -> None:
        super().__init__()
        self.net = model(kind) if net is None else net
        self.net.train()
        self.left = left

    def batch(self, rows: list[Tensor]) -> dict[str, Tensor]:
        width = max(len(row) for row in rows) + int(torch.randint(0, 3, ()))
        ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if self.left else slice(len(row))
            ids[i, place], mask[i, place] = row, 1
        labels = ids.masked_fill(mask == 0, -100) if hasattr(self.net, "lm_head") else ids.sum(1) % 3
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(**batch).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.net(**batch).loss)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(texts(), BATCH, shuffle=True, collate_fn=self.batch)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(texts()[:6], BATCH, collate_fn=self.batch)

    test_dataloader = val_dataloader


class Watch(L.Callback):
    """Counts what goes through a layer, and sees which layers' outputs have a graph."""

    def __init__(self, stack: str) -> None:
        self.stack = stack
        self.runs = 0
        self.graphs: dict[int, set[bool]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        layers = pl_module.net.get_submodule(self.stack)
        # Of a module inside the layer, which runs only if the layer itself does.
        inner = next(part for part in layers[0].modules() if isinstance(part, nn.Linear))
        self.handles = [inner.register_forward_hook(self._count)]
        self.handles += [layer.register_forward_hook(self._see(i)) for i, layer in enumerate(layers)]

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _count(self, *_: Any) -> None:
        self.runs += 1

    def _see(self, i: int) -> Callable[..., None]:
        def see(module: Any, args: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                hidden = output if isinstance(output, Tensor) else output[0]
                self.graphs.setdefault(i, set()).add(hidden.requires_grad)

        return see


class Still(L.Callback):
    """The reference: what is below the top ``k`` layers is put in eval mode by hand while a batch trains."""

    def __init__(self, stack: str, k: int) -> None:
        self.stack, self.k = stack, k

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        net = pl_module.net
        trunk = net.get_submodule(self.stack.split(".")[0])
        layers = list(net.get_submodule(self.stack))
        trunk.eval()
        for layer in layers[len(layers) - self.k :]:
            layer.train()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.net.train()


class Evaluates(L.Callback):
    """The whole model is in eval mode while a batch trains."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.net.eval()


METHODS: dict[str, tuple[Callable[[], Any], int]] = {
    "head": (HeadOnly, 0),
    "top": (lambda: TopLayers(k=1), 1),
    "lora": (lambda: LoRA(r=2, dropout=0.1, target_modules="all-linear", layers_to_transform=[1, 2]), 2),
}
CASES = [(kind, name) for kind in STACKS for name in METHODS if (kind, name) != ("llama", "head")]


def fit(module: Any, *callbacks: Any, seed: int = 3, **more: Any) -> Any:
    torch.manual_seed(seed)
    run = trainer(*callbacks, **{"max_epochs": 3, "num_sanity_val_steps": 0, **more})
    run.fit(module)
    return run


KEY_BIASES = ("key.bias", "k_proj.bias", "key_proj.bias")


def same(a: nn.Module, b: nn.Module) -> None:
    state = b.state_dict()
    # A softmax doesn't see a key's bias: its gradient is rounding, of which Adam makes steps.
    seen = {key: value for key, value in a.state_dict().items() if not key.endswith(KEY_BIASES)}
    for key, value in seen.items():
        torch.testing.assert_close(value, state[key], atol=1e-5, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("where", ["memory", "folder"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_training_is_the_same_and_what_is_frozen_runs_once(kind: str, name: str, where: str, tmp_path: Path) -> None:
    method, top = METHODS[name]
    plain, cached = Texts(kind), Texts(kind)
    fit(plain, method(), Still(STACKS[kind], top))
    cache, watch = TrunkCache(folder=tmp_path / "kept" if where == "folder" else None), Watch(STACKS[kind])
    run = fit(cached, method(), cache, watch)
    same(plain, cached)
    before = Texts(kind).state_dict()
    assert any(key not in before or not torch.equal(value, before[key]) for key, value in cached.state_dict().items())
    batches = ROWS // BATCH
    # Its six validation rows are among those it trains on. The first batch is run once more, to compare.
    assert watch.runs == batches + 1
    assert cache.calls == 3 * (batches + 2)
    assert cache.hits == cache.calls - batches
    assert watch.graphs == {i: {i >= LAYERS - top} for i in range(LAYERS)}
    assert not list(tmp_path.glob("kept/*")), "nothing stays behind"
    assert all("forward" not in vars(part) for part in cached.modules())
    assert all(part.training for part in cached.net.modules())
    hits = cache.hits
    run.test(cached, verbose=False)
    assert cache.hits == hits + 2, "test goes on with it"


@pytest.mark.parametrize("name", METHODS)
def test_no_graph_is_built_of_what_is_frozen(name: str) -> None:
    method, top = METHODS[name]
    expected = {i: {i >= LAYERS - top} for i in range(LAYERS)}
    for extra in ([], [GradientCheckpointing()], [GradientCheckpointing(), TrunkCache()]):
        module, watch = Texts(), Watch(STACKS["bert"])
        fit(module, method(), *extra, watch, max_epochs=2)
        assert watch.graphs == expected, extra
    asking = Texts()
    asking.net.enable_input_require_grads()  # as for the reentrant kind of checkpointing
    watch = Watch(STACKS["bert"])
    fit(asking, method(), TrunkCache(), watch, max_epochs=2)
    assert watch.graphs == expected


def test_checkpointing_and_autocast_go_with_it() -> None:
    method = METHODS["lora"][0]
    for more, extra in (({}, [GradientCheckpointing()]), ({"precision": "bf16-mixed"}, [])):
        plain, cached, cache = Texts("llama"), Texts("llama"), TrunkCache()
        fit(plain, method(), Still(STACKS["llama"], 2), *extra, **more)
        fit(cached, method(), *extra, cache, **more)
        assert cache.hits == cache.calls - ROWS // BATCH
        if more:  # what goes into a bf16 product is rounded by it, as without the cache
            for key, value in plain.state_dict().items():
                torch.testing.assert_close(cached.state_dict()[key], value, atol=3e-2, rtol=3e-2, msg=key)
        else:
            same(plain, cached)


@pytest.mark.parametrize("case", ["averaging", "unfreezing"])
def test_what_looks_at_the_weights_goes_with_it(case: str) -> None:
    method, extra, top = {
        "averaging": (lambda: TopLayers(k=1), lambda: [Averaging(decay=0.5, start=1)], 1),
        "unfreezing": (lambda: GradualUnfreezing(max_layers=2), list, 2),
    }[case]
    plain, cached, cache = Texts(), Texts(), TrunkCache()
    fit(plain, method(), *extra(), Still(STACKS["bert"], top))
    fit(cached, method(), *extra(), cache)
    same(plain, cached)
    assert cache.hits == cache.calls - ROWS // BATCH


def test_a_copy_that_is_made_in_a_batch_knows_nothing_of_it() -> None:
    class Against(Texts):
        """The loss holds the model to what it was, as the KL penalty does, by a copy that it makes when it needs it."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if not hasattr(self, "other"):
                base = find_base(self.net)
                self.other = (Origin().bare(base), copy.deepcopy(self.net).eval())  # a tuple is no submodule
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            found = self.net(**batch)
            with torch.no_grad():
                self.seen = [other(**inputs).logits for other in self.other]
            return found.loss + sum(F.mse_loss(found.logits, seen) for seen in self.seen)

    plain, cached, cache = Against(), Against(), TrunkCache()
    fit(plain, METHODS["lora"][0](), Still(STACKS["bert"], 2))
    fit(cached, METHODS["lora"][0](), cache)
    same(plain, cached)
    assert cache.calls == 3 * (ROWS // BATCH + 2), "its own calls, not those of copies"


def test_a_finder_that_trains_before_the_fit_goes_with_it() -> None:
    module, cache = Texts(), TrunkCache()
    module.lr = 1e-3
    fit(module, TopLayers(k=1), cache, LearningRateFinder(num_training_steps=6, early_stop_threshold=None))
    assert cache.hits == cache.calls - ROWS // BATCH
    pickle.dumps(TrunkCache())


def test_padding_on_the_left_is_the_same_too() -> None:
    method, top = METHODS["top"]
    plain, cached, cache = Texts("llama", left=True), Texts("llama", left=True), TrunkCache()
    fit(plain, method(), Still(STACKS["llama"], top))
    fit(cached, method(), cache)
    same(plain, cached)


def test_the_budget_is_kept() -> None:
    row = 16 * 4  # bytes of a token
    tokens = [len(row) for row in texts()]
    budget = (sum(tokens) // 2) * row
    module, cache = Texts(), TrunkCache(max_mib=budget / 2**20)
    plain = Texts()
    fit(plain, TopLayers(k=1), Still(STACKS["bert"], 1))
    fit(module, TopLayers(k=1), cache)
    same(plain, module)
    assert 0 < cache._store.bytes <= budget
    assert cache._store.refused
    assert cache.hits < cache.calls - 2 * ROWS // BATCH


def test_what_was_kept_serves_a_later_fit_unless_the_frozen_weights_changed() -> None:
    cache, module = TrunkCache(), Texts()
    for hits in (4, 8):
        run = fit(module, HeadOnly(), cache, max_epochs=2, limit_val_batches=0)
        assert cache.hits == hits
    with torch.no_grad():  # one value of one row, which a sample misses
        module.net.bert.embeddings.word_embeddings.weight[7, 3] += 1.0
    run.test(module, verbose=False)
    fresh = Texts()
    fresh.load_state_dict(module.state_dict())
    fit(fresh, HeadOnly(), Still(STACKS["bert"], 0), max_epochs=2)
    fit(module, HeadOnly(), cache, max_epochs=2)
    assert cache.hits == 4 + 2 + 2
    same(fresh, module)
    fit(module, TopLayers(k=1), cache, max_epochs=2, limit_val_batches=0)
    assert cache.hits == 4, "it ends at another layer"


def test_weights_that_are_loaded_within_a_fit_are_noticed() -> None:
    class Loads(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                state = pl_module.net.bert.state_dict()
                pl_module.net.bert.load_state_dict({key: value * 1.1 for key, value in state.items()})

    plain, cached, cache = Texts(), Texts(), TrunkCache()
    fit(plain, HeadOnly(), Still(STACKS["bert"], 0), Loads())
    fit(cached, HeadOnly(), cache, Loads())
    same(plain, cached)
    assert cache.hits == cache.calls - 2 * ROWS // BATCH


def test_what_was_kept_of_other_weights_within_a_fit_serves_no_later_one_over_the_first() -> None:
    class Loads(L.Callback):
        factor = 1.1

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                state = pl_module.net.bert.state_dict()
                pl_module.net.bert.load_state_dict({key: value * self.factor for key, value in state.items()})

    cache, module, plain, loads = TrunkCache(), Texts(), Texts(), Loads()
    first = {key: value.clone() for key, value in module.net.bert.state_dict().items()}
    fit(module, HeadOnly(), cache, loads, max_epochs=2)
    module.net.bert.load_state_dict(first)
    plain.load_state_dict(module.state_dict())
    fit(module, HeadOnly(), cache, max_epochs=2)
    fit(plain, HeadOnly(), Still(STACKS["bert"], 0), max_epochs=2)
    same(plain, module)

    loads.factor, cache = 1, TrunkCache()
    fit(Texts(), HeadOnly(), cache, loads)
    assert cache.hits == cache.calls - ROWS // BATCH, "the same was loaded again"


def test_a_resumed_fit_is_the_same(tmp_path: Path) -> None:
    half, resumed = Texts(), Texts()
    fit(half, TopLayers(k=1), TrunkCache(), seed=5, max_epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    cached = trainer(TopLayers(k=1), TrunkCache(), max_epochs=2)
    rest = trainer(TopLayers(k=1), Still(STACKS["bert"], 1), max_epochs=2)
    torch.manual_seed(6)
    cached.fit(half, ckpt_path=tmp_path / "x.ckpt")
    torch.manual_seed(6)
    rest.fit(resumed, ckpt_path=tmp_path / "x.ckpt")
    same(half, resumed)


def test_nothing_of_it_is_in_the_module() -> None:
    class Copies(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            parts = list(pl_module.modules())
            assert not [part for part in parts if "forward" in vars(part) or part._forward_pre_hooks]
            pickle.dumps(pl_module.net)

    cache = TrunkCache()
    module = Texts()
    calls: list[int] = []
    fit(module, HeadOnly(), cache, Copies(), max_epochs=1)

    class Breaks(Texts):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            super().training_step(batch, batch_idx)
            raise RuntimeError("in the middle")

    own = Breaks()
    original = own.net.bert.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    own.net.bert.forward = forward  # as accelerate's hooks do
    with pytest.raises(RuntimeError, match="in the middle"):
        fit(own, HeadOnly(), TrunkCache())
    assert calls
    assert own.net.bert.forward is forward
    assert own.net.bert.training


@pytest.mark.parametrize("error", [IndexError, KeyboardInterrupt])
@pytest.mark.parametrize("hit", [False, True])
def test_a_call_that_ends_early_leaves_the_model_as_it_was(error: Any, hit: bool) -> None:
    class Ends(Texts):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)

            def end(*_: Any) -> None:
                raise error("early")

            if not hit:
                batch["input_ids"] = batch["input_ids"].flip(1)
            handle = self.net.bert.encoder.layer[-1].register_forward_hook(end)
            try:
                super().training_step(batch, batch_idx)
            finally:
                handle.remove()
            return loss

    module, cache = Ends(), TrunkCache()
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fit(module, TopLayers(k=1), cache, max_epochs=1)
    assert cache.hits == hit
    assert all(part.training for part in module.net.modules())
    parts = list(module.modules())
    assert not [part for part in parts if "forward" in vars(part) or part._forward_pre_hooks or part._forward_hooks]


def test_generation_does_not_take_from_it() -> None:
    class Writes(Texts):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                found = self.net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                self.past = found.past_key_values
                self.written = self.net.generate(
                    batch["input_ids"][:1], max_new_tokens=4, do_sample=False, pad_token_id=0
                )

    module, cache = Writes("llama"), TrunkCache()
    run = fit(module, TopLayers(k=1), cache, max_epochs=1)
    before = cache.hits
    torch.manual_seed(5)
    run.validate(module, verbose=False)
    assert cache.hits > before
    written = module.written
    assert module.past is None, "they would be the upper layers' alone"
    torch.manual_seed(5)
    trainer().validate(module, verbose=False)
    assert torch.equal(module.written, written)


class Embedded(Texts):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        embedded = self.net.bert.embeddings.word_embeddings(batch["input_ids"])
        return self.net(inputs_embeds=embedded, labels=batch["labels"]).loss


class Deep(Texts):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(**batch, output_hidden_states=True).loss


class Past(Texts):
    """It calls the encoder, not the text model."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        bert = self.net.bert
        hidden = bert.encoder(bert.embeddings(batch["input_ids"])).last_hidden_state
        return F.cross_entropy(self.net.classifier(hidden[:, 0]), batch["labels"])


def test_what_would_keep_nothing_is_refused() -> None:
    for kind, said in (
        (Embedded, "BertModel is given no input_ids"),
        (Deep, "BertModel is asked for output_hidden_states"),
        (Past, "its BertModel isn't called"),
    ):
        with pytest.raises(UserError, match=said):
            fit(kind(), HeadOnly(), TrunkCache())
    for method, said in (
        (LoRA(r=2), r"encoder\.layer\.0\.attention\.self\.query\.lora_A"),
        (BitFit(), r"embeddings\.LayerNorm\.bias"),
        (PromptTuning(2), "prompt"),
        (TopLayers(k=1, modules_to_save=["word_embeddings"]), r"embeddings\.word_embeddings\.weight"),
    ):
        with pytest.raises(InjectionError, match=said):
            fit(Texts(), method, TrunkCache())
    with pytest.raises(InjectionError, match="Hugging Face text model"):
        fit(make(CNN), LoRA(r=2, backbone="body", target_modules=["8"]), TrunkCache(backbone="body"))
    with pytest.raises(InjectionError, match="needs a stack of layers"):
        fit(Texts(net=tiny.bert_classifier(num_hidden_layers=1)), HeadOnly(), TrunkCache())
    with pytest.raises(UserError, match="compiled"):
        fit(Texts(), HeadOnly(), TrunkCache(), Compile(backend="eager"))
    for wrong in (0, -1.0, "much"):
        with pytest.raises(ValueError, match="max_mib"):
            TrunkCache(max_mib=wrong)  # type: ignore[arg-type]


def test_a_model_whose_layers_hand_on_more_is_refused() -> None:
    class T5(Texts):
        def __init__(self) -> None:
            super().__init__(net=tiny.t5_encoder())
            self.head = nn.Linear(16, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            labels = batch.pop("labels")
            return F.cross_entropy(self.head(self.net(**batch).last_hidden_state[:, 0]), labels)

    plain, cached = T5(), T5()  # its upper layers read the biases of the first, heads don't
    fit(plain, HeadOnly(), Evaluates(), limit_val_batches=0)
    fit(cached, HeadOnly(), TrunkCache(), limit_val_batches=0)
    same(plain, cached)
    with pytest.raises(UserError, match="can't do without its lower layers"):
        fit(T5(), TopLayers(k=1), TrunkCache(), limit_val_batches=0)

    class Skips(nn.Module):
        """Its top reads the first layer's output past the second, as no check of structure can see."""

        def __init__(self, encoder: Any) -> None:
            super().__init__()
            self.layer = encoder.layer

        def forward(self, hidden_states: Tensor, attention_mask: Any = None, **_: Any) -> Any:
            first = self.layer[0](hidden_states, attention_mask)
            second = self.layer[1](first, attention_mask)
            last = self.layer[2](first + second, attention_mask)
            return type("Outputs", (), {"last_hidden_state": last, "past_key_values": None})()

    module = Texts()
    module.net.bert.encoder = Skips(module.net.bert.encoder)
    with pytest.raises(UserError, match="can't do without its lower layers"):
        fit(module, TopLayers(k=1), TrunkCache(), limit_val_batches=0)


def test_a_trunk_under_a_head_of_ones_own(caplog: Any) -> None:
    module, cache = make(TrunkInSetup), TrunkCache()
    fit(module, HeadOnly(), cache)
    assert cache.hits == cache.calls - 3


@pytest.mark.parametrize(
    "build", [tiny.roberta, tiny.electra, tiny.deberta, tiny.modernbert, tiny.bloom, tiny.gpt_neox, tiny.opt, tiny.gpt2]
)
def test_other_models(build: Any) -> None:
    class Headed(Texts):
        def __init__(self) -> None:
            super().__init__(net=build())
            torch.manual_seed(1)
            self.head = nn.LazyLinear(3)
            self.head(torch.zeros(1, 50 if hasattr(self.net, "lm_head") else 16))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            return F.cross_entropy(self.head(self.net(**inputs)[0][:, 0]), batch["input_ids"].sum(1) % 3)

    plain, cached, cache = Headed(), Headed(), TrunkCache()
    fit(plain, TopLayers(k=1), Evaluates(), limit_val_batches=0)
    fit(cached, TopLayers(k=1), Evaluates(), cache, limit_val_batches=0)
    same(plain, cached)
    assert cache.hits == cache.calls - ROWS // BATCH


# ------------------------------------------------------------------------------------------ rows


def test_a_row_is_what_it_says_wherever_it_stands() -> None:
    ids, mask = torch.tensor([[5, 6, 0], [7, 0, 0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])

    def keys(ids: Tensor, mask: Tensor | None, salt: str = "", **more: Tensor) -> list[bytes]:
        return [row.key for row in rows_of({"input_ids": ids, "attention_mask": mask, **more}, salt)]

    two = keys(ids, mask)
    assert len(set(two)) == 2
    wider = F.pad(ids, (0, 4), value=9), F.pad(mask, (0, 4))
    assert keys(*(value.flip(0) for value in wider)) == two[::-1]
    assert keys(ids[:1, :2], mask[:1, :2]) == two[:1]
    kinds = torch.tensor([[0, 1, 0], [0, 0, 0]])
    others = [
        keys(F.pad(ids, (1, 0)), F.pad(mask, (1, 0))),
        keys(ids, None),
        keys(ids, mask, "bf16"),
        keys(ids, mask, token_type_ids=kinds),
        keys(ids, mask, position_ids=kinds),
        keys(ids, mask, position_ids=torch.arange(1, 4)[None]),
        keys(ids, torch.tensor([[1, 0, 1], [1, 1, 1]])),
        keys(ids, mask[:, None, None].expand(2, 1, 3, 3)),
    ]
    known = [key for found in [two, *others] for key in found]
    assert len(set(known)) == len(known)
    assert [row[1:] for row in rows_of({"input_ids": ids, "attention_mask": mask * 0}, "")] == [(0, 0), (0, 0)]
    with pytest.raises(ValueError, match=r"token_type_ids has the shape \(3, 3\)"):
        keys(ids, mask, token_type_ids=torch.zeros(3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_store_gives_back_what_it_was_given(mapped: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    rows = rows_of({"input_ids": torch.arange(12).view(4, 3)}, "")
    values = torch.randn(4, 3, 5).to(dtype)
    store = RowStore(3 * values[0].nbytes, tmp_path if mapped else None)
    for row, value in zip(rows, values, strict=True):
        store.add(row, value)
        store.add(row, value)
        if row in store:
            assert torch.equal(store[row], value)
    kept = values.clone()
    values.zero_()
    assert all(torch.equal(store[row], value) for row, value in zip(rows[:3], kept, strict=False))
    assert (len(store), store.bytes, rows[3] in store) == (3, 3 * kept[0].nbytes, False)
    store.clear()
    assert (len(store), store.bytes, rows[0] in store) == (0, 0, False)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RowStore(2**20, tmp_path)
    (row,) = rows_of({"input_ids": torch.ones(1, 3)}, "")

    def full(_: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store._medium._file, "write", full, raising=False)
    with pytest.raises(UserError, match=r"can't write to .*No space left.*max_mib"):
        store.add(row, torch.ones(3, 4))
    assert row not in store
