"""Serve one model pair behind Ray Serve's OpenAI API, verified by the drop-in.

    python examples/ray_serve.py --target TARGET --draft DRAFT            # GPUs of the cluster
    python examples/ray_serve.py --target TARGET --draft DRAFT --cpu      # CPU slots

The option is one entry of ``engine_kwargs``, as it is one argument of ``vllm serve``. It needs ``ray[serve]`` and vLLM;
``ray[llm]`` would install a vLLM of Ray's choice over yours. Connects to a running cluster, else starts Ray here.
"""

import argparse
from pathlib import Path

from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def llm_config(target: str, draft: str, on_cpu: bool = False, method: str = "exact", **engine_kwargs) -> LLMConfig:
    """Return the configuration of one deployment; further arguments are vLLM's engine arguments."""
    return LLMConfig(
        model_loading_config={"model_id": Path(target).name, "model_source": target},
        # Without a GPU in its placement Ray takes vLLM's multiprocessing executor instead of its own.
        placement_group_config={"bundles": [{"CPU": 1}]} if on_cpu else None,
        engine_kwargs={
            "speculative_config": {"model": draft, "num_speculative_tokens": 4},
            "additional_config": {"specopt": {"method": method}},
            **({"enforce_eager": True} if on_cpu else {}),
            **engine_kwargs,
        },
        deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
    )


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="folder or Hugging Face name of the target model")
    parser.add_argument("--draft", required=True, help="folder or Hugging Face name of the draft model")
    parser.add_argument("--cpu", action="store_true", help="serve on CPU slots")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
    config = llm_config(arguments.target, arguments.draft, arguments.cpu)
    serve.run(build_openai_app({"llm_configs": [config]}), blocking=True)


if __name__ == "__main__":
    main()
