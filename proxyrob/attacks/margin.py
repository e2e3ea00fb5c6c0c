"""How far an answer is from the other side of the decision."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def margins(logits: Float[Tensor, "n k"], labels: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The largest logit of another class less that of the label: positive where the image is misclassified."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own
