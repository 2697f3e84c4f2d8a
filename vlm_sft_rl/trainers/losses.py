"""Losses and probabilities as pure tensor functions."""

import torch
from torch import Tensor

_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # on logits, in text configs


def weighted_nll(log_probs: Tensor, weights: Tensor, denominator: Tensor | int) -> Tensor:
    """Weighted negative log-likelihood: `sum(-log_probs * weights) / max(denominator, 1)`.

    With every weight 1 this is, operation by operation, TRL's own loss, so it agrees with it to the last bit. REVERSE
    (arXiv 2504.13169, Eq. 1) is the case of weights 0 and 1, with the number of supervised tokens as denominator.

    Args:
        log_probs: (batch, length - 1), log-probability of each next token, 0 where there is no label.
        weights: same shape; the weight of predicting that next token.
        denominator: number of supervised tokens that the sum is divided by.
    """
    return (-log_probs * weights).sum() / torch.as_tensor(denominator).clamp(min=1)


def span_advantages(advantages: Tensor, wrong: Tensor, credit: float) -> Tensor:
    """Advantages by token, lowered where the answer is wrong: `A - credit * |A|` there, `A` elsewhere (arXiv 2604.24583).

    Args:
        advantages: (answers,).
        wrong: (answers, length), True at the tokens of wrong phrases.

    Returns:
        (answers, length).
    """
    by_token = advantages.unsqueeze(1)
    return by_token - credit * by_token.abs() * wrong


def scale_logits(raw: Tensor, text_config) -> Tensor:
    """Apply the factor and the soft cap that some families put on their logits, as TRL's `add_fused_lm_head` does."""
    named = (getattr(text_config, name, None) for name in _FACTORS)
    factor = next((value for value in named if value is not None), None)
    if factor is None and (scaling := getattr(text_config, "logits_scaling", None)) is not None:
        # HyperCLOVA X multiplies by what Granite divides by
        factor = scaling if getattr(text_config, "model_type", "") == "hyperclovax" else 1 / scaling
    logits = raw if factor is None else raw * factor
    cap = getattr(text_config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def unconfident_probabilities(
    log_probs: Tensor, labels: Tensor, hidden: Tensor, rows: Tensor, ids: tuple[int, int], text_config=None
) -> tuple[Tensor, Tensor, Tensor]:
    """P(`</UN>`) at every supervised closing tag, exact and without a pass over the vocabulary.

    At `</UN>` the label's log-probability is the answer. At `</CN>` it lacks only the difference of two logits:
    P(UN) = P(CN) * exp(z_UN - z_CN), so two rows of the output embedding suffice.

    Args:
        log_probs: (batch, length - 1) of the labels.
        labels: (batch, length - 1), shifted, -100 where there is no loss.
        hidden: (batch, length - 1, width), last hidden states before the output embedding.
        rows: (2, width), output rows of `</CN>` and `</UN>`.
        ids: the ids of `</CN>` and `</UN>`.

    Returns:
        For the n closing tags: probabilities in float32; truth, True where the label is `</UN>`; and whether the
        likelier of the two closing tags is the right one.
    """
    confident, unconfident = ids
    at = (labels == confident) | (labels == unconfident)
    truth = labels[at] == unconfident
    # no matrix product: autocast would round it to 16 bits, and the gap of two logits near 20 to eighths
    logits = scale_logits((hidden[at].float().unsqueeze(1) * rows.float()).sum(-1), text_config)
    gap = logits[:, 1] - logits[:, 0]
    probabilities = (log_probs[at].float() + torch.where(truth, 0.0, gap)).exp().clamp(max=1.0)
    return probabilities, truth, (gap > 0) == truth


def next_token_log_probs(model, hidden: Tensor) -> Tensor:
    """(n, vocabulary) in float32: what the output embedding makes of a few last hidden states (n, width).

    The model is in memory whole, not in shards.
    """
    head = model.get_output_embeddings()
    logits = head(hidden.to(next(head.parameters()).dtype)).float()
    return scale_logits(logits, model.config.get_text_config()).log_softmax(-1)


def divergence(reference: Tensor, policy: Tensor) -> Tensor:
    """KL(reference || policy) of rows of log-probabilities, (n,)."""
    return (reference.exp() * (reference - policy)).sum(-1)
