"""Acceptance within a budget: a chosen draft token may be kept more often than its probability, at a bounded price.

A token of probability p is kept with the largest probability h >= p such that KL(Bernoulli(h), Bernoulli(p)) <= delta,
otherwise the row's token given that it is another one is emitted: at most delta nats of KL divergence for each verified
token. Given that the row's token is another one, that is probability (h - p) / (1 - p); and as the divergence grows
with h, u <= (h - p) / (1 - p) is the same as KL(Bernoulli(p + u (1 - p)), Bernoulli(p)) <= delta: h is never computed.
"""

import triton
import triton.language as tl


@triton.jit
def delta_of(request, constants_ptr, rule_requests_ptr):
    """What a request may spend on a token: its own delta where flags are fp32, else that of the constants."""
    delta = tl.load(constants_ptr)
    if rule_requests_ptr is not None:
        flag = tl.load(rule_requests_ptr + request.state)
        if flag.dtype == tl.float32:
            delta = flag
    return delta


@triton.jit
def passes(uniform, prob, delta):
    """Whether the draft token replaces another one; prob: its probability."""
    kept = tl.fma(uniform, 1.0 - prob, prob)
    certain = tl.where(prob > 0.0, prob, 1.0)
    divergence = kept * tl.log(kept / certain) + (1.0 - kept) * tl.log(1.0 - uniform)
    return (prob > 0.0) & (divergence <= delta)


@triton.jit
def spent(prob, delta):
    """Divergence, in nats, of what is emitted in a draft token's place from the target's distribution."""
    certain = tl.where(prob > 0.0, prob, 1.0)
    return tl.where(prob > 0.0, tl.minimum(delta, tl.zeros_like(prob) - tl.log(certain)), 0.0)
