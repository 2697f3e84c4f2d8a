"""Verification tokens in the tokenizer and in both embedding matrices of any vision-language model."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import nn

from ..data.chat import get_tokenizer
from ..data.tags import CONFIDENT, OPEN, UNCONFIDENT, VERIFICATION_TOKENS
from ..errors import UserError

INITS = ("mean", "semantic")
DESCRIPTIONS = {
    OPEN: " here begins a phrase",
    CONFIDENT: " correct true certain yes",
    UNCONFIDENT: " wrong false doubtful no",
}
# rows of equal value would give the three tokens equal logits; this breaks the tie without leaving the mean
NOISE = 0.02


def verification_token_ids(processor, tokens: Sequence[str] = VERIFICATION_TOKENS) -> list[int] | None:
    """Ids of the tokens in the order given; None when the tokenizer lacks one of them."""
    vocabulary = get_tokenizer(processor).get_vocab()
    ids = [vocabulary.get(token) for token in tokens]
    return None if None in ids else ids


def require_verification_tokens(processor, source: str, model=None) -> list[int]:
    """The three ids. Raises UserError where the tokenizer lacks one, or an embedding matrix of `model` its row."""
    cure = f"Run `vlm-sft-rl model prepare {source or 'MODEL'} PREPARED` and use the folder that it writes."
    source = source or "the model in memory"
    ids = verification_token_ids(processor)
    if ids is None:
        vocabulary = get_tokenizer(processor).get_vocab()
        missing = ", ".join(token for token in VERIFICATION_TOKENS if token not in vocabulary)
        raise UserError(f"{source}: the tokenizer lacks the verification tokens {missing}. {cure}")
    if model is not None and (rows := embedding_rows(model)) <= max(ids):
        raise UserError(
            f"{source}: the tokenizer has token id {max(ids)} but the model has only {rows} embedding rows. {cure}"
        )
    return ids


def row_count(weight: torch.Tensor) -> int:
    """Rows of the whole weight: ZeRO-3 leaves a partitioned one with an empty tensor and its shape in `ds_shape`."""
    return getattr(weight, "ds_shape", weight.shape)[0]


def embedding_rows(model) -> int:
    """Rows that both the input and the output embedding have."""
    return min(row_count(matrix) for matrix in embedding_matrices(model))


def add_verification_tokens(model, processor, init: str = "mean", seed: int = 0) -> list[int]:
    """Give a model and its processor the tokens `<SPAN>`, `</CN>`, `</UN>`; both are changed in place.

    They are plain added tokens, so that `skip_special_tokens=True` keeps them. The matrices grow only when the ids do
    not fit: a checkpoint with padding rows (Qwen, LLaVA-1.5) keeps its size. New rows start at the mean of the rows in
    use (`init="mean"`) or at the mean of the rows of words that describe the token (`init="semantic"`), plus a small
    seeded noise. Tokens that are there already keep their rows, so a second call changes nothing.

    Args:
        model: a `PreTrainedModel` with floating-point embeddings, not wrapped by PEFT.
        processor: its processor or tokenizer.

    Returns:
        The three token ids, in the order of `VERIFICATION_TOKENS`.
    """
    if init not in INITS:
        raise UserError(f"init must be one of {', '.join(INITS)}, not {init!r}.")
    tokenizer = get_tokenizer(processor)
    special = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and token.content in VERIFICATION_TOKENS
    ]
    if special:
        raise UserError(
            f"The tokenizer has {', '.join(special)} as special tokens, which decoding would strip. Start from the "
            "model without them, or remove them from its tokenizer files."
        )
    if not model.get_input_embeddings().weight.is_floating_point():
        raise UserError(
            "Tokens cannot be added to quantised embeddings. Prepare the model first, quantise after."
        )

    vocabulary, rows_before = tokenizer.get_vocab(), embedding_rows(model)
    used_before = max(vocabulary.values()) + 1
    fresh = [token for token in VERIFICATION_TOKENS if token not in vocabulary]
    tokenizer.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t in fresh], special_tokens=False
    )
    ids = verification_token_ids(tokenizer)
    resize_if_needed(model, max(tokenizer.get_vocab().values()) + 1)

    pairs = list(zip(VERIFICATION_TOKENS, ids, strict=True))
    to_fill = [i for t, i in pairs if t in fresh or i >= rows_before]
    if to_fill:
        words = None
        if init == "semantic":
            words = {i: tokenizer(DESCRIPTIONS[t], add_special_tokens=False)["input_ids"] for t, i in pairs}
        in_use = min(used_before, rows_before, *to_fill)
        for matrix in embedding_matrices(model):
            fill_rows(matrix, to_fill, in_use, words, seed)
    return ids


def embedding_matrices(model) -> list[torch.Tensor]:
    """The weights of the input and the output embedding; one when they are tied or there is no output."""
    matrices = [model.get_input_embeddings().weight]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not matrices[0]:
        matrices.append(output.weight)
    return matrices


def is_tied(model) -> bool:
    """Whether the input and the output embedding are one matrix (by identity: configs are known to be wrong)."""
    return model.get_output_embeddings() is not None and len(embedding_matrices(model)) == 1


def resize_if_needed(model, size: int) -> None:
    """Grow the embeddings to `size` rows if they have fewer, and make every config say how many there are.

    Mllama builds eight input rows more than its config's vocabulary (for the image token); they are kept, because the
    class will build them again when the checkpoint is loaded.
    """
    text_config = model.config.get_text_config()
    surplus = max(row_count(model.get_input_embeddings().weight) - text_config.vocab_size, 0)
    if embedding_rows(model) < size:
        largest = max(row_count(matrix) for matrix in embedding_matrices(model))
        model.resize_token_embeddings(max(size, largest), mean_resizing=False)
        model.tie_weights()
        if surplus:
            old = model.get_input_embeddings()
            weight = F.pad(old.weight.detach(), (0, 0, 0, surplus))
            grown = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=old.padding_idx)
            model.set_input_embeddings(grown)
    rows = row_count(model.get_input_embeddings().weight) - surplus
    if embedding_rows(model) == rows:
        text_config.vocab_size = rows
        # some families repeat the number at the top level, where loaders of other tools look for it
        if "vocab_size" in model.config.__dict__:
            model.config.vocab_size = rows


@torch.no_grad()
def fill_rows(
    matrix: nn.Parameter, rows: list[int], in_use: int, words: dict[int, list[int]] | None, seed: int
) -> None:
    """Overwrite `rows` of `matrix` (vocabulary, hidden) with a mean of existing rows plus seeded noise.

    Args:
        in_use: only the first `in_use` rows count for the mean and the scale (padding rows are noise).
        words: for each row the rows to average; None averages all rows in use.
    """
    known = matrix[:in_use].float()
    centre, scale = known.mean(0), known.std(0)
    for row in rows:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
        noise = torch.randn(matrix.shape[1], generator=generator).to(matrix.device)
        base = centre if words is None else known[[w for w in words[row] if w < in_use]].mean(0)
        matrix[row] = (base + NOISE * scale * noise).to(matrix.dtype)
