"""What a worker says of itself, once, when its runner is built."""

from vllm.logger import init_logger

from vllm_specopt.integration.config import SpecoptConfig
from vllm_specopt.rules import RULES, BudgetConstants, Constants, TypicalConstants

logger = init_logger("vllm.specopt")


def log_active(runner: str, config: SpecoptConfig, device, backend: str, speculative) -> None:
    """Which sampler is at work, and what its output is, if that is not the target's distribution."""
    more = " per_request=allowed" if config.allow_per_request else " speculation=off" if speculative is None else ""
    if config.sharded:
        more += " logits=sharded"
    if config.audit:
        more += f" audit={config.audit:g}"
    logger.info(
        "specopt: active: runner=%s method=%s backend=%s device=%s%s", runner, config.method, backend, device, more
    )
    rule = config.rule
    if rule is None or RULES[rule.NAME].lossless:
        return
    who = f"requests that choose the method {rule.NAME}" if config.method == "exact" else f"the method {rule.NAME}"
    logger.warning(
        "specopt: the output of %s does not follow the target model's distribution at temperature > 0: %s",
        who,
        _price(rule, speculative.draft_sample_method != "probabilistic", config.allow_per_request),
    )


def _price(rule: Constants, certain: bool, by_request: bool) -> str:
    """What a lossy rule gives away. certain: drafts are chosen. by_request: requests may set a delta of their own."""
    if isinstance(rule, BudgetConstants):
        own = ", or by what its request sets" if by_request else ""
        return f"a verified token may differ from it by up to {rule.delta:g} nats of KL divergence{own}"
    if isinstance(rule, TypicalConstants):
        return (
            "a draft token survives whenever its probability exceeds "
            f"min({rule.epsilon:g}, {rule.delta:g} exp(-entropy)), however often that is"
        )
    if certain:
        return (
            "drafts come without probabilities here, so a draft token survives with its target score as the "
            "probability (0.62 for every token with the paper's constants)"
        )
    return (
        "wherever scores of the two models are close, nearly every draft token survives, and the text becomes the "
        "draft model's"
    )


def log_not_replaced(current) -> None:
    """Why a runner keeps its sampler, ``current``; None where it does not sample."""
    if current is None:
        logger.info("specopt: not active: this worker does not sample")
    else:
        logger.warning(
            "specopt: not active: the model or another plugin brings its own %s, and whether min-p, logit bias and "
            "custom logits processors apply to draft tokens is up to that",
            type(current).__qualname__,
        )


def log_unstable(sampler, audit_wanted: bool = False) -> None:
    """What it means that only the rejection sampler is ours."""
    logger.warning(
        "specopt: seeds are not stable across steps without drafts%s: the model or another plugin brings its own %s",
        ", and nothing is audited" if audit_wanted else "",
        type(sampler).__qualname__,
    )
