"""Where vLLM is met: hooks, configuration, samplers of both model runners, metrics."""
