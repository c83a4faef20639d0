"""Complete a file of prompts with Ray Data, verified by the drop-in.

    python examples/ray_data.py --target TARGET --draft DRAFT prompts.jsonl completions/

Reads JSON lines with a "prompt", writes JSON lines with "prompt" and "completion". It needs ``ray[data]`` and vLLM;
``ray[llm]`` would install a vLLM of Ray's choice over yours. Connects to a running cluster, else starts Ray here.
"""

import argparse

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig


def processor(
    target: str, draft: str, sampling: dict, on_cpu: bool = False, method: str = "exact", batch_size: int = 64,
    **engine_kwargs,
):  # fmt: skip
    """Return what maps a dataset with "prompt" to one with "prompt" and "completion"; the rest is vLLM's arguments."""
    config = vLLMEngineProcessorConfig(
        model_source=target,
        engine_kwargs={
            "speculative_config": {"model": draft, "num_speculative_tokens": 4},
            "additional_config": {"specopt": {"method": method}},
            **({"enforce_eager": True} if on_cpu else {}),
            **engine_kwargs,
        },
        placement_group_config={"bundles": [{"CPU": 1}]} if on_cpu else None,
        concurrency=1,
        batch_size=batch_size,
        chat_template_stage=False,
        log_engine_metrics=False,
    )
    return build_processor(
        config,
        preprocess=lambda row: {"prompt": row["prompt"], "sampling_params": sampling},
        postprocess=lambda row: {"prompt": row["prompt"], "completion": row["generated_text"]},
    )


def main() -> None:
    """Complete every prompt of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", help="JSON lines, each with a prompt")
    parser.add_argument("completions", help="folder to write")
    parser.add_argument("--target", required=True, help="folder or Hugging Face name of the target model")
    parser.add_argument("--draft", required=True, help="folder or Hugging Face name of the draft model")
    parser.add_argument("--cpu", action="store_true", help="run on CPU slots")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    arguments = parser.parse_args()
    sampling = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
    complete = processor(arguments.target, arguments.draft, sampling, arguments.cpu)
    complete(ray.data.read_json(arguments.prompts)).write_json(arguments.completions)


if __name__ == "__main__":
    main()
