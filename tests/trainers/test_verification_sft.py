import copy

import families
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tagged_rows import prepared
from training import (
    SETTINGS,
    arguments,
    history,
    loaded_trainer,
    moved,
    tagged,
    tagged_dataset,
    trainable,
    trainer_of,
    weights,
    without,
)
from trl import SFTConfig, SFTTrainer

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.load import VLMModelConfig, load_for_inference
from vlm_sft_rl.models.lora import build_peft_config
from vlm_sft_rl.models.sidecar import read_sidecar
from vlm_sft_rl.trainers.verification_sft import (
    VerificationSFTConfig,
    VerificationSFTTrainer,
    build_collator,
    output_rows,
)

FAMILIES = ["llava", "qwen2_5_vl"]


def made(folder, pair=None, dataset=None, **settings) -> VerificationSFTTrainer:
    settings = {"hint_probability": 0.0, "gradient_accumulation_steps": 2, **settings}
    rows = tagged_dataset(folder) if dataset is None else dataset
    return trainer_of(VerificationSFTTrainer, folder, rows, pair or tagged(), **settings)


def reweighed(collator, weight=None):
    """A collator without its weights, which is what stock TRL can take, or with other ones."""

    def collate(rows):
        batch = collator(rows)
        filled = {} if weight is None else {"loss_weights": torch.full_like(batch["loss_weights"], weight)}
        return without(batch, "loss_weights") | filled

    return collate


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_one_are_stock_trl_to_the_last_bit(tmp_path, family):
    model, processor = tagged(family)
    dataset, args = (
        tagged_dataset(tmp_path),
        arguments(VerificationSFTTrainer, tmp_path, hint_probability=0.0),
    )
    collator = build_collator(processor, args)
    stock = SFTTrainer(
        copy.deepcopy(model),
        SFTConfig(
            str(tmp_path / "stock"),
            **SETTINGS,
            gradient_accumulation_steps=2,
            bf16=False,
            max_length=None,
            remove_unused_columns=False,
        ),
        data_collator=reweighed(collator),
        train_dataset=dataset,
        processing_class=processor,
    )
    # for Qwen2.5-VL stock TRL averages the means of micro-batches, although its fused head need not
    stock.model_accepts_loss_kwargs = True
    ones = made(tmp_path, (copy.deepcopy(model), processor), dataset, data_collator=reweighed(collator, 1.0))
    # the collator's own weights are 1 wherever there is a label
    plain = made(tmp_path, (model, processor), dataset)
    for trainer in (stock, ones, plain):
        trainer.train()
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert history(ones, key) == history(stock, key) and len(history(ones, key)) == 3
    assert not moved(weights(stock.model), ones.model)
    assert history(plain, "loss") == history(stock, "loss")


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_verdicts_equal_a_slow_reference(tmp_path, family):
    trainer = made(tmp_path, tagged(family), close_tag_weight=2.5)
    model, dataset = trainer.model, trainer.train_dataset
    _, confident, unconfident = trainer.processing_class.tokenizer.convert_tokens_to_ids(
        ["<SPAN>", "</CN>", "</UN>"]
    )
    batch = trainer.data_collator([dataset[i] for i in range(4)])
    with torch.no_grad():
        logp = model.eval()(**without(batch, "labels", "loss_weights")).logits[:, :-1].log_softmax(-1)
    labels, factors = batch["labels"][:, 1:], batch["loss_weights"][:, 1:]
    total, counted, closing = 0.0, 0, {confident: [], unconfident: []}
    for i, j in (labels != -100).nonzero().tolist():
        label = labels[i, j].item()
        counted += 1
        assert factors[i, j] == (2.5 if label in closing else 1.0)
        total -= factors[i, j].item() * logp[i, j, label].item()
        if label in closing:
            closing[label].append(logp[i, j, unconfident].exp().item())
    model.train()
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(counted))
    assert abs(loss.item() - total / counted) < 1e-5
    trainer.log({"loss": 0.0})
    (record,) = trainer.state.log_history
    for name, label in (("confident", confident), ("unconfident", unconfident)):
        mean = sum(closing[label]) / len(closing[label])
        assert abs(record[f"p_unconfident/on_{name}"] - mean) < 1e-7
    assert 0 <= record["verdict_accuracy"] <= 1 and 0 <= record["verdict_auc"] <= 1


def doubted(row: dict, doubt: float) -> dict:
    """The row with a verdict as a probability."""
    question, answer = row["messages"]
    doubts = [doubt] * answer["content"].count("<SPAN>")
    return row | {"messages": [question, answer | {"doubts": doubts}]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_doubt_is_taught_in_place_of_the_tag_that_stands_there(tmp_path, family):
    rows = list(tagged_dataset(tmp_path))
    rows = [doubted(row, 0.25) if number % 2 else row for number, row in enumerate(rows)]
    trainer = made(tmp_path, tagged(family), Dataset.from_list(rows))
    model, closing = trainer.model, list(trainer.verification.closing)
    batch = trainer.data_collator(rows[:4])
    with torch.no_grad():
        inputs = without(batch, "labels", "loss_weights", "doubts")
        logp = model.eval()(**inputs).logits[:, :-1].log_softmax(-1)
    labels, doubts = batch["labels"][:, 1:], batch["doubts"][:, 1:]
    total, counted = 0.0, 0
    for i, j in (labels != -100).nonzero().tolist():
        label = labels[i, j].item()
        soft = i % 2 == 1 and label in closing
        assert doubts[i, j] == (0.25 if soft else -1)
        values = logp[i, j, closing]
        total -= (0.75 * values[0] + 0.25 * values[1] if soft else logp[i, j, label]).item()
        counted += 1
    assert (doubts == 0.25).any()
    model.train()
    count = torch.tensor(counted)
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    assert abs(loss.item() - total / counted) < 1e-5
    # which of the two stands there makes no difference
    swapped = batch["labels"].clone()
    for one, other in (closing, closing[::-1]):
        swapped[(batch["doubts"] >= 0) & (batch["labels"] == one)] = other
    same = trainer.compute_loss(model, batch | {"labels": swapped}, num_items_in_batch=count)
    assert same.item() == pytest.approx(loss.item(), abs=1e-5)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("doubt", [0.0, 1.0])
def test_a_doubt_without_doubt_is_a_tag(tmp_path, doubt):
    rows = list(tagged_dataset(tmp_path))
    tag, other = ("</UN>", "</CN>") if doubt else ("</CN>", "</UN>")
    for row in rows:
        row["messages"][1]["content"] = row["messages"][1]["content"].replace(other, tag)
    trainer = made(tmp_path, dataset=Dataset.from_list(rows))
    count = torch.tensor(7)
    plain, soft = (
        trainer.compute_loss(trainer.model, trainer.data_collator(each), num_items_in_batch=count).item()
        for each in (rows[:4], [doubted(row, doubt) for row in rows[:4]])
    )
    assert soft == pytest.approx(plain, abs=1e-6)


def test_tokens_inside_a_hallucinated_phrase_do_not_matter(tmp_path):
    trainer = made(tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[1]])
    closes = trainer.processing_class.tokenizer.convert_tokens_to_ids("</UN>")
    end = (batch["input_ids"][0] == closes).nonzero().item()
    assert batch["labels"][0, end] == closes and batch["labels"][0, end - 1] == -100
    assert batch["loss_weights"][0, end - 1] == 0


@pytest.mark.parametrize(("family", "tie"), [("llava", False), ("llava", True), ("qwen2_5_vl", True)])
def test_lora_trains_new_rows_saves_and_loads(tmp_path, family, tie):
    training = {"projector_learning_rate": 5e-4, "gradient_checkpointing": True, "max_steps": 3}
    training |= {"gradient_accumulation_steps": 2, "hint_probability": 0.0, "learning_rate": 1e-3}
    base = prepared(tmp_path, family, tie=tie)
    trainer, ids = loaded_trainer(base, tmp_path, training=training, use_peft=True, lora_r=4)
    plain = trainer.plain_model
    assert plain.config.tie_word_embeddings == tie
    matrices = [plain.get_input_embeddings, plain.get_output_embeddings]
    before, start = [matrix().weight.detach().clone() for matrix in matrices], weights(trainer.model)
    trainer.train()
    for old, matrix in zip(before, matrices, strict=True):
        assert (old != matrix().weight).any(dim=1).nonzero().flatten().tolist() == ids
    assert moved(start, trainer.model) == trainable(trainer.model)
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-3, 5e-4}
    trainer.save_model()
    assert read_sidecar(trainer.args.output_dir).threshold == (0.003 if family == "llava" else 0.01)
    again, _, _ = load_for_inference(trainer.args.output_dir, device="cpu")
    inputs = without(trainer.data_collator([trainer.train_dataset[0]]), "labels", "loss_weights")
    trainer.model.eval()
    with torch.no_grad():
        assert torch.allclose(again(**inputs).logits, trainer.model(**inputs).logits, atol=1e-5)


def test_weights_scale_the_loss_as_trl_scales_it_under_tensor_parallelism(tmp_path, monkeypatch):
    """Four processes in groups of two: a weight of 2 on every token doubles the loss only if both parts agree."""
    trainer = made(tmp_path, verdict_metrics=False)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 4))
    trainer.model._tp_size = 2
    trainer.model.train()
    rows, losses = [trainer.train_dataset[i] for i in range(2)], []
    for weight in (1.0, 2.0):
        batch = reweighed(trainer.data_collator, weight)(rows)
        losses.append(trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(17)).item())
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6)


@pytest.mark.parametrize("tie", [False, True])
def test_output_rows_follow_the_adapter(tie):
    model, processor = tagged(tie=tie)
    ids = processor.tokenizer.convert_tokens_to_ids(["<SPAN>", "</CN>", "</UN>"])
    assert torch.equal(output_rows(model.lm_head, tuple(ids[1:])), model.lm_head.weight[ids[1:]])
    peft = get_peft_model(model, build_peft_config(model, VLMModelConfig(use_peft=True), ids))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
    head = peft.get_base_model().get_output_embeddings()
    for rows in (ids[1:], [3, 5]):
        assert torch.equal(output_rows(head, tuple(rows)), head.weight[rows])


def test_evaluation_logs(tmp_path):
    dataset = tagged_dataset(tmp_path)
    evaluated = {"eval_dataset": dataset.select(range(3)), "eval_strategy": "steps", "eval_steps": 1}
    trainer = made(tmp_path, dataset=dataset, max_steps=1, **evaluated)
    trainer.train()
    for key in ("eval_loss", "eval_verdict_accuracy", "eval_p_unconfident/on_confident"):
        assert history(trainer, key)


def test_text_only_rows_train(tmp_path):
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "<SPAN> Hi </CN>."}]
    rows = Dataset.from_list([{"id": str(i), "messages": messages} for i in range(4)])
    assert torch.isfinite(torch.tensor(made(tmp_path, dataset=rows, max_steps=1).train().training_loss))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"packing": True}, "packing"),
        ({"padding_free": True}, "padding_free"),
        ({"assistant_only_loss": True}, "assistant_only_loss"),
        ({"loss_type": "dft"}, "loss_type"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"close_tag_weight": -1.0}, "close_tag_weight"),
        ({"max_length": 10}, "row-0.*tokens.*limit is 10|rows.json:1.*limit is 10"),
    ],
)
def test_settings_that_would_go_wrong_are_refused(tmp_path, change, complaint):
    with pytest.raises(UserError, match=complaint):
        made(tmp_path, **change)


def test_models_and_processors_that_do_not_fit_are_refused(tmp_path):
    dataset, (model, processor) = tagged_dataset(tmp_path), tagged()
    with pytest.raises(UserError, match="model prepare"):
        made(tmp_path, families.llava(), dataset)
    with pytest.raises(UserError, match="embedding rows"):
        made(tmp_path, (families.llava()[0], processor), dataset)
    with pytest.raises(UserError, match="processor"):
        made(tmp_path, (model, processor.tokenizer), dataset)
    with pytest.raises(UserError, match="VerificationSFTConfig"):
        other = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
        VerificationSFTTrainer(model, other, train_dataset=dataset)
    silent = dataset.map(lambda r: {"messages": [{**m, "weight": 0} for m in r["messages"]]})
    with pytest.raises(UserError, match=r"no token has loss.*has weight 0"):
        made(tmp_path, (model, processor), silent)


def test_weights_that_do_not_lie_over_the_labels_are_refused(tmp_path):
    trainer = made(tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    batch["loss_weights"] = batch["loss_weights"][:, 1:]
    with pytest.raises(UserError, match="They must be equal"):
        trainer.compute_loss(trainer.model, batch)


def test_config_defaults():
    config = VerificationSFTConfig("x", use_cpu=True)
    assert config.max_length is None and config.remove_unused_columns is False and config.bf16 is False
    assert config.hint_probability == 0.2 and config.close_tag_weight == 1.0


def test_a_figure_that_no_evaluation_has_is_named(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "best",
        "metric_for_best_model": "eval_f1",
    }
    trainer = made(tmp_path, eval_dataset=tagged_dataset(tmp_path), **settings)
    with pytest.raises(UserError, match=r"'eval_f1', which is not found.*'eval_loss'"):
        trainer.train()


def test_a_model_in_memory_has_no_name_to_show(tmp_path):
    with pytest.raises(
        UserError, match=r"^the model in memory: .* Run `vlm-sft-rl model prepare MODEL PREPARED`"
    ):
        made(tmp_path, pair=families.llava())
