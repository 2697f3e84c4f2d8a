"""Policy gradient as pure tensor functions: KL in the return, baselines, advantage, clipped surrogate.

As in SC-Tune (arXiv 2403.13263) and its released code: no critic, no whitening, no entropy bonus; discount 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...decoding.tried import weights

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


def distinct_baselines(rewards: Tensor, probabilities: Sequence[float]) -> Tensor:
    """For each description of a group drawn without replacement, the mean reward that the others let expect.

    p(s) f(s) + (1 - p(s)) f(t), t the description drawn behind s, has the policy's mean of f as its own whatever s is; of t
    the expectation is taken over all that may have come next (Kool, van Hoof and Welling, arXiv 2002.06043). So it may be
    taken off f(s) without a bias. Rewards and result: (draws,); probabilities: of each as a first draw.
    """
    values = rewards.double()
    baselines = []
    for i, p in enumerate(probabilities):
        others = [other / max(1 - p, 1e-9) for other in (*probabilities[:i], *probabilities[i + 1 :])]
        shares = torch.tensor(weights(others), dtype=torch.float64)
        # from differences: equal rewards have exactly themselves as their mean, and so no advantage
        gaps = torch.cat([values[:i], values[i + 1 :]]) - values[i]
        baselines.append(values[i] + (1 - p) * (shares * gaps).sum())
    return torch.stack(baselines).to(rewards.dtype)


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
