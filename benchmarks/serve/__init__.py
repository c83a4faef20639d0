"""Arms that differ in the sampler, compared in whole vLLM engines: served, or offline."""
