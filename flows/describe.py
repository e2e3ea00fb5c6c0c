"""How a model was made, in words, for its card."""

from flows.plan import Variant, robust_training
from proxyrob.config import PipelineConfig
from proxyrob.config.objective import MartObjective, NaturalObjective, PgdObjective, TradesObjective
from proxyrob.config.proxy import PublishedProxy, weighted_parts

OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}


def describe_training(config: PipelineConfig, variant: Variant) -> str:
    """The training of a variant, for its card."""
    train = robust_training(config, variant)
    match train.objective:
        case PgdObjective(attack_steps=steps):
            method = f"PGD-{steps} adversarial training"
        case TradesObjective(attack_steps=steps, beta=beta):
            method = f"TRADES (beta {beta:g}, {steps} attack steps)"
        case MartObjective(attack_steps=steps, beta=beta):
            method = f"MART (beta {beta:g}, {steps} attack steps)"
        case NaturalObjective():
            method = "natural training"
    if (awp := train.objective.awp) is not None:
        method += f" with weight perturbation (gamma {awp.gamma:g})"
    parts = f", {train.num_synthetic} of them synthetic, gamma {train.gamma:g}" if train.num_synthetic else ""
    return (
        f"{method} against {config.threat}, {train.steps} steps of {train.batch_size} images{parts}, "
        f"{OPTIMIZERS[train.optimizer.kind]}, weight average {train.ema_decay:g}"
    )


def describe_data(config: PipelineConfig, variant: Variant) -> str:
    """The training data of a variant, for its card."""
    known = config.source.known_train
    real = f"{'all' if known is None else f'{known:,}'} real images of {config.source.dataset}"
    if variant == "real-only" or config.proxy is None:
        return real
    made = []
    for part in weighted_parts(config.proxy):
        proxy = part.proxy
        what = "a published set" if isinstance(proxy, PublishedProxy) else "proxy fitted to the same real images"
        name = proxy.name if isinstance(proxy, PublishedProxy) else proxy.kind
        made.append(
            f"{proxy.num_images:,} synthetic ones ({name} {what})"
            if name == proxy.kind
            else f"{proxy.num_images:,} synthetic ones ({what}, {name})"
        )
    return f"{real} and {' and '.join(made)}"
