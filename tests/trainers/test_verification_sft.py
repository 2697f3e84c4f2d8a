import copy

import families
import pytest
import torch
from datasets import Dataset
from tagged_rows import prepared, write_rows
from trl import SFTConfig, SFTTrainer

from vlm_sft_rl.data.rows import read_rows
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.load import VLMModelConfig, load_for_inference, load_for_training
from vlm_sft_rl.models.lora import build_peft_config
from vlm_sft_rl.models.sidecar import read_sidecar
from vlm_sft_rl.models.tokens import add_verification_tokens, is_tied
from vlm_sft_rl.trainers.verification_sft import (
    VerificationSFTConfig,
    VerificationSFTTrainer,
    build_collator,
    output_rows,
)

FAMILIES = ["llava", "qwen2_5_vl"]


def settings(folder, **changes):
    return {
        "output_dir": str(folder / "out"),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "hint_probability": 0.0,
        **changes,
    }


def rows(folder):
    path = write_rows(folder / "data")
    return Dataset.from_list(list(read_rows(path))), folder / "data"


class Stripped:
    """A collator without its weights, or with other ones: what stock TRL can take."""

    def __init__(self, collator, weight=None):
        self.collator, self.weight = collator, weight

    def __call__(self, batch_rows):
        batch = self.collator(batch_rows)
        weights = batch.pop("loss_weights")
        return (
            batch if self.weight is None else {**batch, "loss_weights": torch.full_like(weights, self.weight)}
        )


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def run(cls, config, model, processor, dataset, collator, **kwargs):
    trainer = cls(
        copy.deepcopy(model),
        config,
        data_collator=collator,
        train_dataset=dataset,
        processing_class=processor,
        **kwargs,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_one_are_stock_trl_to_the_last_bit(tmp_path, family):
    dataset, root = rows(tmp_path)
    model, processor = getattr(families, family)()
    add_verification_tokens(model, processor)
    ours = VerificationSFTConfig(**settings(tmp_path))
    collator = build_collator(processor, ours, image_root=root)
    stock = settings(tmp_path, bf16=False, max_length=None, remove_unused_columns=False)
    stock.pop("hint_probability")
    theirs = run(SFTTrainer, SFTConfig(**stock), model, processor, dataset, Stripped(collator))
    mine = run(VerificationSFTTrainer, ours, model, processor, dataset, Stripped(collator, 1.0))
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert history(mine, key) == history(theirs, key) and len(history(mine, key)) == 3
    for (name, a), b in zip(theirs.model.state_dict().items(), mine.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    # the collator's own weights are 1 wherever there is a label
    plain = run(VerificationSFTTrainer, ours, model, processor, dataset, collator)
    assert history(plain, "loss") == history(theirs, "loss")


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_verdicts_equal_a_slow_reference(tmp_path, family):
    dataset, root = rows(tmp_path)
    model, processor = getattr(families, family)()
    ids = add_verification_tokens(model, processor)
    config = VerificationSFTConfig(**settings(tmp_path, close_tag_weight=2.5))
    collator = build_collator(processor, config, image_root=root)
    trainer = VerificationSFTTrainer(
        model, config, data_collator=collator, train_dataset=dataset, processing_class=processor
    )
    batch = collator([dataset[i] for i in range(4)])
    with torch.no_grad():
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "loss_weights")}
        logp = model(**inputs).logits[:, :-1].log_softmax(-1)
    labels, weights = batch["labels"][:, 1:], batch["loss_weights"][:, 1:]
    total, counted, on = 0.0, 0, {ids[1]: [], ids[2]: []}
    for i in range(labels.shape[0]):
        for j in range(labels.shape[1]):
            label = labels[i, j].item()
            if label == -100:
                continue
            counted += 1
            close = label in ids[1:]
            assert weights[i, j] == (2.5 if close else 1.0)
            total -= weights[i, j].item() * logp[i, j, label].item()
            if close:
                on[label].append(logp[i, j, ids[2]].exp().item())
    model.train()
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(counted))
    assert abs(loss.item() - total / counted) < 1e-5
    metrics = {key: values[0] for key, values in trainer._metrics["train"].items()}
    assert abs(metrics["p_unconfident/on_confident"] - sum(on[ids[1]]) / len(on[ids[1]])) < 1e-7
    assert abs(metrics["p_unconfident/on_unconfident"] - sum(on[ids[2]]) / len(on[ids[2]])) < 1e-7
    assert 0 <= metrics["verdict_accuracy"] <= 1 and 0 <= metrics["verdict_auc"] <= 1


def test_tokens_inside_a_hallucinated_phrase_do_not_matter(tmp_path):
    dataset, root = rows(tmp_path)
    model, processor = families.llava()
    add_verification_tokens(model, processor)
    collator = build_collator(processor, VerificationSFTConfig(**settings(tmp_path)), image_root=root)
    batch = collator([dataset[1]])
    closes = processor.tokenizer.convert_tokens_to_ids("</UN>")
    end = (batch["input_ids"][0] == closes).nonzero().item()
    assert batch["labels"][0, end] == closes and batch["labels"][0, end - 1] == -100
    assert batch["loss_weights"][0, end - 1] == 0


@pytest.mark.parametrize(("family", "tie"), [("llava", False), ("llava", True), ("qwen2_5_vl", True)])
def test_lora_trains_new_rows_saves_and_loads(tmp_path, family, tie):
    dataset, root = rows(tmp_path)
    args = VLMModelConfig(
        model_name_or_path=str(prepared(tmp_path, family, tie=tie)), use_peft=True, lora_r=4
    )
    model, processor, ids, _ = load_for_training(args)
    tied = is_tied(model)
    config = VerificationSFTConfig(
        **settings(tmp_path, projector_learning_rate=5e-4, gradient_checkpointing=True)
    )
    collator = build_collator(processor, config, image_root=root)
    trainer = VerificationSFTTrainer(
        model,
        config,
        data_collator=collator,
        train_dataset=dataset,
        processing_class=processor,
        peft_config=build_peft_config(model, args, ids),
    )
    base = trainer.model.get_base_model()
    matrices = [base.get_input_embeddings, base.get_output_embeddings]
    before = [m().weight.detach().clone() for m in matrices]
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    for old, matrix in zip(before, matrices, strict=True):
        assert (old != matrix().weight).any(dim=1).nonzero().flatten().tolist() == ids
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    rates = {g["initial_lr"] for g in trainer.optimizer.param_groups}
    assert rates == {1e-3, 5e-4} and tied == tie
    trainer.save_model()
    assert read_sidecar(config.output_dir).threshold == (0.003 if family == "llava" else 0.01)
    again, _, _ = load_for_inference(config.output_dir, device="cpu")
    batch = collator([dataset[0]])
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "loss_weights")}
    trainer.model.eval()
    with torch.no_grad():
        assert torch.allclose(again(**inputs).logits, trainer.model(**inputs).logits, atol=1e-5)


def test_weights_scale_the_loss_as_trl_scales_it_under_tensor_parallelism(tmp_path, monkeypatch):
    """Four processes in groups of two: a weight of 2 on every token doubles the loss only if both parts agree."""
    dataset, root = rows(tmp_path)
    model, processor = families.llava()
    add_verification_tokens(model, processor)
    config = VerificationSFTConfig(**settings(tmp_path, verdict_metrics=False))
    collator = build_collator(processor, config, image_root=root)
    trainer = VerificationSFTTrainer(
        model, config, data_collator=collator, train_dataset=dataset, processing_class=processor
    )
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 4))
    model._tp_size = 2
    model.train()
    losses = []
    for weight in (1.0, 2.0):
        batch = Stripped(collator, weight)([dataset[i] for i in range(2)])
        losses.append(trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(17)).item())
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6)


def test_output_rows_follow_the_adapter(tmp_path):
    from peft import get_peft_model

    for tie in (False, True):
        model, processor = families.llava(tie=tie)
        ids = add_verification_tokens(model, processor)
        assert torch.equal(output_rows(model.lm_head, tuple(ids[1:])), model.lm_head.weight[ids[1:]])
        peft = get_peft_model(model, build_peft_config(model, VLMModelConfig(use_peft=True), ids))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "tokens_delta" in name:
                    parameter.add_(torch.randn_like(parameter))
        head = peft.get_base_model().get_output_embeddings()
        assert torch.equal(output_rows(head, tuple(ids[1:])), head.weight[ids[1:]])
        assert torch.equal(output_rows(head, (3, 5)), head.weight[[3, 5]])


def test_collator_is_built_and_evaluation_logs(tmp_path):
    dataset, root = rows(tmp_path)
    dataset = dataset.map(lambda row: {"images": [str(root / name) for name in row["images"]]})
    model, processor = families.llava()
    add_verification_tokens(model, processor)
    config = VerificationSFTConfig(**settings(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1))
    trainer = VerificationSFTTrainer(
        model,
        config,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(3)),
        processing_class=processor,
    )
    trainer.train()
    assert {"eval_loss", "eval_verdict_accuracy", "eval_p_unconfident/on_confident"} <= set().union(
        *map(set, trainer.state.log_history)
    )


def test_text_only_rows_train(tmp_path):
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "<SPAN> Hi </CN>."}]
    dataset = Dataset.from_list([{"id": str(i), "messages": messages} for i in range(4)])
    model, processor = families.llava()
    add_verification_tokens(model, processor)
    config = VerificationSFTConfig(**settings(tmp_path, max_steps=1))
    trainer = VerificationSFTTrainer(model, config, train_dataset=dataset, processing_class=processor)
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))


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
    dataset, root = rows(tmp_path)
    dataset = dataset.map(lambda row: {"images": [str(root / name) for name in row["images"]]})
    model, processor = families.llava()
    add_verification_tokens(model, processor)
    with pytest.raises(UserError, match=complaint):
        VerificationSFTTrainer(
            model,
            VerificationSFTConfig(**settings(tmp_path, **change)),
            train_dataset=dataset,
            processing_class=processor,
        )


def test_models_and_processors_that_do_not_fit_are_refused(tmp_path):
    dataset, root = rows(tmp_path)
    config = VerificationSFTConfig(**settings(tmp_path))
    model, processor = families.llava()
    with pytest.raises(UserError, match="model prepare"):
        VerificationSFTTrainer(model, config, train_dataset=dataset, processing_class=processor)
    fresh = families.llava()[0]
    add_verification_tokens(model, processor)
    with pytest.raises(UserError, match="embedding rows"):
        VerificationSFTTrainer(fresh, config, train_dataset=dataset, processing_class=processor)
    with pytest.raises(UserError, match="processor"):
        VerificationSFTTrainer(model, config, train_dataset=dataset, processing_class=processor.tokenizer)
    with pytest.raises(UserError, match="VerificationSFTConfig"):
        VerificationSFTTrainer(
            model, SFTConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=dataset
        )
    silent = dataset.map(lambda r: {"messages": [{**m, "weight": 0} for m in r["messages"]]})
    with pytest.raises(UserError, match="no token has loss"):
        VerificationSFTTrainer(
            model,
            config,
            data_collator=build_collator(processor, config, image_root=root),
            train_dataset=silent,
            processing_class=processor,
        )


def test_config_defaults():
    config = VerificationSFTConfig("x", use_cpu=True)
    assert config.max_length is None and config.remove_unused_columns is False and config.bf16 is False
    assert config.hint_probability == 0.2 and config.close_tag_weight == 1.0


def fully_trained(folder, dtype, **own):
    """A trainer of all of a model's weights."""
    dataset, root = rows(folder)
    model, processor = families.llava()
    add_verification_tokens(model, processor)
    config = VerificationSFTConfig(**settings(folder, **own))
    return VerificationSFTTrainer(
        model.to(dtype),
        config,
        data_collator=build_collator(processor, config, image_root=root),
        train_dataset=dataset,
        processing_class=processor,
    )


def test_full_training_in_16_bits_is_warned_of(tmp_path, caplog):
    for dtype, said in ((torch.float32, 0), (torch.bfloat16, 1)):
        fully_trained(tmp_path, dtype)
        assert sum("small updates vanish" in record.message for record in caplog.records) == said


@pytest.mark.parametrize(
    "dtype, own, why",
    [(torch.float16, {}, "Adam divides by zero"), (torch.bfloat16, {"fp16": True}, "scaler of `fp16: true`")],
)
def test_weights_that_cannot_be_trained_are_refused(tmp_path, dtype, own, why):
    with pytest.raises(UserError, match=why):
        fully_trained(tmp_path, dtype, **own)
