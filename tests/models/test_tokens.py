import copy

import families
import pytest
import torch

from vlm_sft_rl.data.tags import VERIFICATION_TOKENS
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.load import load_model
from vlm_sft_rl.models.tokens import (
    add_verification_tokens,
    embedding_matrices,
    embedding_rows,
    is_tied,
    require_verification_tokens,
    resize_if_needed,
    row_count,
    verification_token_ids,
)
from vlm_sft_rl.trainers.checks import check_reference

CASES = [(family, tie) for family in ("llava", "qwen2_5_vl") for tie in (False, True)]


@pytest.fixture(params=CASES, ids=[f"{family}-{'tied' if tie else 'untied'}" for family, tie in CASES])
def pair(request):
    family, tie = request.param
    return getattr(families, family)(tie=tie)


def test_tokens_get_rows_and_nothing_else_changes(pair):
    model, processor = pair
    before = [m.detach().clone() for m in embedding_matrices(model)]
    tied, used = is_tied(model), len(processor.tokenizer)
    ids = add_verification_tokens(model, processor)
    assert ids == [used, used + 1, used + 2]
    after = embedding_matrices(model)
    assert is_tied(model) == tied and len(after) == len(before)
    for old, new in zip(before, after, strict=True):
        assert new.shape[0] > max(ids)
        assert torch.equal(old[:used], new[:used])
        # rows that padded the matrix before and are still unused stay as they were
        assert torch.equal(old[max(ids) + 1 :], new[max(ids) + 1 : old.shape[0]])


@pytest.mark.parametrize("family, padding", [("qwen2_5_vl", 7), ("llava", 0)])
def test_a_padded_matrix_keeps_its_size_and_a_full_one_grows(family, padding):
    model, processor = getattr(families, family)()
    rows = row_count(model.get_input_embeddings().weight)
    assert rows == len(processor.tokenizer) + padding
    add_verification_tokens(model, processor)
    head = model.get_output_embeddings()
    sizes = {row_count(matrix) for matrix in embedding_matrices(model)} | {head.out_features}
    assert sizes == {rows if padding else rows + 3} == {model.config.get_text_config().vocab_size}


def test_llama_3_2_vision_keeps_its_surplus_of_input_rows(tmp_path):
    """The image token has an input row and no output row; the class builds eight input rows more than it has words."""
    model, processor = families.mllama()
    used, words = len(processor.tokenizer), model.get_output_embeddings().weight.shape[0]
    assert used == words + 1 and [m.shape[0] for m in embedding_matrices(model)] == [words + 8, words]
    ids = add_verification_tokens(model, processor)
    assert ids[0] == used
    assert [m.shape[0] for m in embedding_matrices(model)] == [words + 16, words + 8]
    assert torch.isfinite(model.get_output_embeddings().weight).all()
    again = load_model(families.save(model, processor, tmp_path))
    assert all(map(torch.equal, embedding_matrices(model), embedding_matrices(again)))
    assert add_verification_tokens(again, processor) == ids
    assert [m.shape[0] for m in embedding_matrices(again)] == [words + 16, words + 8]


def test_second_call_changes_nothing(pair):
    model, processor = pair
    ids = add_verification_tokens(model, processor)
    before = copy.deepcopy(model.state_dict())
    assert add_verification_tokens(model, processor, init="semantic", seed=5) == ids
    assert len(processor.tokenizer) == max(ids) + 1
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_mean_rows_lie_at_the_mean_of_the_rows_in_use(pair):
    model, processor = pair
    used = len(processor.tokenizer)
    expected = [(m[:used].mean(0), m[:used].std(0)) for m in embedding_matrices(model)]
    ids = add_verification_tokens(model, processor, init="mean")
    for matrix, (mean, std) in zip(embedding_matrices(model), expected, strict=True):
        assert ((matrix[ids] - mean).abs() <= 0.1 * std).all()
        assert len({tuple(row.tolist()) for row in matrix[ids]}) == 3


def test_semantic_rows_lie_at_their_words(pair):
    model, processor = pair
    words = processor.tokenizer(" wrong false doubtful no", add_special_tokens=False)["input_ids"]
    expected = [m[words].mean(0).clone() for m in embedding_matrices(model)]
    ids = add_verification_tokens(model, processor, init="semantic")
    for matrix, mean in zip(embedding_matrices(model), expected, strict=True):
        distance = (matrix[ids] - mean).norm(dim=1)
        assert distance.argmin() == 2 and distance[2] < 0.1 * mean.norm() + 0.01


def test_rows_depend_on_the_seed_alone():
    def rows(seed):
        torch.manual_seed(torch.seed())
        model, processor = families.llava()
        ids = add_verification_tokens(model, processor, seed=seed)
        return model.get_input_embeddings().weight[ids]

    assert torch.equal(rows(1), rows(1)) and not torch.equal(rows(1), rows(2))


def test_text_round_trip_keeps_the_tags(pair):
    model, processor = pair
    ids = add_verification_tokens(model, processor)
    text = "There is <SPAN> a kettle </CN> and <SPAN> a toaster </UN>"
    encoded = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [i for i in encoded if i in ids] == [ids[0], ids[1], ids[0], ids[2]]
    assert processor.tokenizer.decode(encoded, skip_special_tokens=True) == text
    assert processor.tokenizer.convert_ids_to_tokens(ids) == list(VERIFICATION_TOKENS)


def test_tokens_in_the_tokenizer_without_rows_get_them():
    _, processor = families.llava()
    add_verification_tokens(families.llava()[0], processor)
    model = families.llava()[0]
    with pytest.raises(UserError, match="model prepare"):
        require_verification_tokens(processor, "somewhere", model)
    ids = add_verification_tokens(model, processor)
    mean = model.get_input_embeddings().weight[: ids[0]].mean(0)
    assert (model.get_input_embeddings().weight[ids] - mean).norm() < 0.1
    assert require_verification_tokens(processor, "somewhere", model) == ids


def test_what_cannot_be_is_named():
    model, processor = families.llava()
    assert verification_token_ids(processor) is None
    cure = "models/x: .*<SPAN>, </CN>, </UN>.*vlm-sft-rl model prepare models/x"
    with pytest.raises(UserError, match=cure):
        require_verification_tokens(processor, "models/x")
    with pytest.raises(UserError, match="mean, semantic"):
        add_verification_tokens(model, processor, init="zeros")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<SPAN>"]})
    with pytest.raises(UserError, match="special"):
        add_verification_tokens(model, processor)


def test_rows_of_a_partitioned_weight_are_those_of_the_whole_one(pair, tmp_path):
    model, processor = pair
    add_verification_tokens(model, processor)
    families.save(model, processor, tmp_path)
    rows = embedding_rows(model)
    for weight in embedding_matrices(model):  # as ZeRO-3 leaves them: empty, with the whole shape beside
        weight.ds_shape = weight.shape
        weight.data = torch.empty(0)
    assert row_count(model.get_input_embeddings().weight) == embedding_rows(model) == rows > 0
    require_verification_tokens(processor, "it", model)
    check_reference(model, str(tmp_path), "DPO")
    resize_if_needed(model, rows)
    assert model.config.get_text_config().vocab_size == rows
