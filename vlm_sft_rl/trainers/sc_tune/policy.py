"""Policy gradient as pure tensor functions: KL in the return, baselines, advantage, clipped surrogate.

As in SC-Tune (arXiv 2403.13263) and its released code: no critic, no whitening, no entropy bonus; discount 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# of log p_new - log p_old; e^20 is far beyond every limit on the ratio
LARGEST = 20.0


def token_kl(log_probs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """The k1 sample estimate of KL(policy || reference) per token: signed, unbiased over samples of the policy.

    Args:
        log_probs, reference: (batch, tokens), log-probabilities of the sampled tokens.
        mask: (batch, tokens), 1 on sampled tokens, the end-of-turn token included.
    """
    return (log_probs - reference) * mask


def returns_to_go(rewards: Tensor, kl: Tensor, kl_coef: float) -> Tensor:
    """G_t = R - kl_coef * sum of kl_k over k >= t: the task reward comes with the last token, KL with each.

    Args:
        rewards: (batch,); kl: (batch, tokens), 0 on padding.

    Returns:
        (batch, tokens).
    """
    to_go = kl.flip(-1).cumsum(-1).flip(-1)
    return rewards.unsqueeze(-1) - kl_coef * to_go


def advantages(returns: Tensor, baseline: Tensor, mask: Tensor) -> Tensor:
    """A_t = (G_t - b) on sampled tokens, 0 on padding. `baseline`: (batch,)."""
    return (returns - baseline.unsqueeze(-1)) * mask


def leave_one_out(rewards: Tensor, group: int) -> Tensor:
    """Per sample the mean reward of the other samples of its box (RLOO); boxes are blocks of `group` samples.

    Args:
        rewards: (boxes * group,), group >= 2.
    """
    # in float64 equal rewards have exactly themselves as their mean, and so no advantage
    grouped = rewards.view(-1, group).double()
    return ((grouped.sum(1, keepdim=True) - grouped) / (group - 1)).flatten().to(rewards.dtype)


def without_replacement(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """What the draws of a group count that were drawn one behind the other, each from what the earlier ones left.

    The unordered set estimator (Kool, van Hoof and Welling, arXiv 2002.06043): the first draw has the law of the policy,
    the second that of the policy without the first, and of both the expectation is taken over all orders in which the
    set could have been drawn. So no estimate depends on the order, and sums over the group stay unbiased:

        E sum_s weights[s] f(s) g(s) = E_policy f g,  and  b(s) = sum_t others[s, t] f(t)  may be taken off f(s)
        where g are the policy's scores.

    Args:
        log_probs: (draws,), each draw's log-probability by the policy, that of a first draw; in any order.

    Returns:
        weights (draws,), the probability that a draw was the first; others (draws, draws), the baseline's weights. Both sum
        to 1 over their last dimension. float64; 2^draws terms are summed up.
    """
    log_probs = log_probs.double().cpu()
    probabilities, count = log_probs.exp(), len(log_probs)
    bits = 2 ** torch.arange(count)
    members = (torch.arange(2**count)[:, None] & bits).ne(0).double()  # of every subset of the draws
    # what is left of the policy's mass behind each subset
    left = (1 - members) @ probabilities + (1 - probabilities.sum()).clamp(min=0)
    # a common factor of the probabilities falls out, and a product of small ones would underflow
    scaled = (log_probs - log_probs.mean()).exp()
    # behind each subset, the probability that the other draws follow next, but for that factor
    completed = torch.zeros(2**count, dtype=torch.float64)
    completed[-1] = 1
    for size in reversed(range(count)):
        subsets = (members.sum(1) == size).nonzero().squeeze(1)
        further = completed[subsets[:, None] | bits] * (1 - members[subsets])
        completed[subsets] = further @ scaled / left[subsets]
    weights = scaled * completed[bits] / completed[0]
    others = scaled * completed[bits[:, None] | bits] / completed[bits][:, None]
    # p(first) f(first) + (1 - p(first)) f(second) has the policy's mean of f as its own, whatever the first draw is
    return weights, others.diagonal_scatter(probabilities)


def others_mean(rewards: Tensor, others: Tensor) -> Tensor:
    """The baseline of each draw of a group; `others` as of `without_replacement`, rewards and result (draws,)."""
    # from differences: equal rewards have exactly themselves as their mean, and so no advantage
    gaps = rewards.double() - rewards.double()[:, None]
    return (rewards.double() + (others * gaps).sum(1)).to(rewards.dtype)


@dataclass(frozen=True)
class Surrogate:
    """Sums over the sampled tokens of one batch, so that micro-batches and processes add up.

    Attributes:
        loss: sum of max(-A rho, -A clip(rho)); divide by the number of tokens of the whole step.
        ratio: sum of rho.
        clipped: number of tokens whose clipped term decides.
        drift: sum of log p_old - log p_new, the released code's stopping quantity.
        tokens: number of sampled tokens.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    drift: Tensor
    tokens: Tensor


def clipped_surrogate(
    log_probs: Tensor, old_log_probs: Tensor, advantage: Tensor, mask: Tensor, clip: float
) -> Surrogate:
    """PPO's clipped objective (arXiv 1707.06347, Eq. 7) per token, as sums.

    Args:
        log_probs: (batch, tokens) of the policy, with gradient; old_log_probs: of the policy that sampled.
        clip: half width of the interval around 1 for the ratio.
    """
    # a ratio that overflows would survive a factor of 0 as a gradient that is no number
    difference = ((log_probs - old_log_probs) * mask).clamp(-LARGEST, LARGEST)
    ratio = difference.exp()
    plain, limited = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    loss = (torch.maximum(plain, limited) * mask).sum()
    clipped = ((limited > plain) * mask).sum()
    return Surrogate(loss, (ratio * mask).sum().detach(), clipped, -difference.sum().detach(), mask.sum())
