"""Does a head that drafts from the target's hidden states belong to this target?

vLLM checks it for draft models only. With a head of another target it starts, and stops at the first request, or
drafts tokens that are not the target's.
"""

METHODS = ("eagle", "eagle3", "medusa", "dflash")
# vLLM sets Medusa's vocabulary to the target's itself, and lets DFlash heads have a padded one.
OF_ONE_VOCABULARY = ("eagle", "eagle3")


def foreign_head(speculative_config, model_config) -> str | None:
    """Why the head cannot draft for the target; None if it can, or if there is no head.

    Args:
        speculative_config: vLLM's, or None.
        model_config: vLLM's, of the target.
    """
    if getattr(speculative_config, "method", None) not in METHODS:
        return None
    head = speculative_config.draft_model_config
    name, own = "target_hidden_size", getattr(head.hf_config, "target_hidden_size", None)
    if own is None:
        name, own = "hidden_size", head.get_hidden_size()
    sizes = [(name, own, model_config.get_hidden_size())]
    if speculative_config.method in OF_ONE_VOCABULARY:
        sizes.append(("vocab_size", head.get_vocab_size(), model_config.get_vocab_size()))
    for name, own, target in sizes:
        if own != target:
            return (
                f"the head {speculative_config.model} was made for another target: its {name} is {own}, that of "
                f"{model_config.model} is {target}"
            )
    return None
