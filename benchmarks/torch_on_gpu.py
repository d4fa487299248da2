"""The peer of ``sampler`` and ``grpo_step`` on an NVIDIA card: transformers and PyTorch, the same sizes.

python -m benchmarks.torch_on_gpu --work generate --size 1b --batches 1,64,256
python -m benchmarks.torch_on_gpu --work step --size 1b

Needs a PyTorch for CUDA, which rljax does not install. Nobody has run it on a card. Weights are random. ``generate``
samples completions of full length; ``step`` is an optimizer step of AdamW on a GRPO batch: log-probs of what was
written, a clipped ratio, float32 weights under bfloat16 autocast, blocks computed again, ``--micro`` rows at a time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from benchmarks.workload import COMPLETION, GROUP, LEARNING_RATE, PROMPT, PROMPTS, WEIGHT_DECAY, architecture

NO_TORCH = "error: torch_on_gpu needs a PyTorch that sees a CUDA device, and this Python has none; see pytorch.org"
CLIP = 0.2


def load_torch(device: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise SystemExit(NO_TORCH) from error
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(NO_TORCH)
    return torch


def make_model(torch: Any, size: str, dtype: Any, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {name: value for name, value in architecture(size).items() if name != "model_type"}
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa")).to(dtype)


def measured(torch: Any, device: str, run: Callable[[], Any], repeats: int) -> float:
    """The median of so many runs after two that warm up."""
    seconds = []
    for _ in range(2 + repeats):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def generate(torch: Any, a: argparse.Namespace) -> None:
    model = make_model(torch, a.size, torch.bfloat16, a.device).eval()
    for rows in map(int, a.batches.split(",")):
        prompts = torch.randint(3, model.config.vocab_size, (rows, a.prompt), device=a.device)
        options = {"min_new_tokens": a.completion, "max_new_tokens": a.completion, "do_sample": True, "top_k": 0}

        def run() -> Any:
            return model.generate(prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, **options)  # noqa: B023

        assert run().shape == (rows, a.prompt + a.completion)
        seconds = measured(torch, a.device, run, a.repeats)
        report(torch, a, batch=rows, seconds=seconds, tokens_per_second=rows * a.completion / seconds)


def step(torch: Any, a: argparse.Namespace) -> None:
    model = make_model(torch, a.size, torch.float32, a.device).train()
    model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    tokens = torch.randint(3, model.config.vocab_size, (a.rows, a.prompt + a.completion), device=a.device)
    advantages = torch.randn(a.rows, 1, device=a.device)

    def logprobs(rows: Any) -> Any:
        with torch.autocast(a.device, torch.bfloat16):
            logits = model(rows, logits_to_keep=a.completion + 1).logits[:, :-1]
        chosen = rows[:, -a.completion :, None]
        return torch.log_softmax(logits.float(), dim=-1).gather(2, chosen)[..., 0]

    with torch.no_grad():
        behavior = torch.cat([logprobs(rows) for rows in tokens.split(a.micro)])

    def run() -> None:
        pieces = zip(tokens.split(a.micro), behavior.split(a.micro), advantages.split(a.micro), strict=True)
        for rows, old, advantage in pieces:
            ratio = torch.exp(logprobs(rows) - old)
            clipped = torch.clamp(ratio, 1 - CLIP, 1 + CLIP)
            loss = -torch.minimum(ratio * advantage, clipped * advantage).sum() / behavior.numel()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = measured(torch, a.device, run, a.repeats)
    all_tokens = a.rows * (a.prompt + a.completion)
    report(torch, a, batch=a.rows, seconds=seconds, tokens_per_second=all_tokens / seconds)


def report(torch: Any, a: argparse.Namespace, **fields: Any) -> None:
    on_card = a.device == "cuda"
    line = {
        "benchmark": f"torch_{a.work}",
        "size": a.size,
        "dtype": "bfloat16",
        "prompt": a.prompt,
        "completion": a.completion,
        **fields,
        "device": torch.cuda.get_device_name() if on_card else "cpu",
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    if on_card:
        line["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=("generate", "step"), default="generate")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    defaults = {"size": "1b", "batches": "1,64", "rows": PROMPTS * GROUP, "micro": 16, "repeats": 3}
    for name, value in {**defaults, "prompt": PROMPT, "completion": COMPLETION}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    a = parser.parse_args()
    (generate if a.work == "generate" else step)(load_torch(a.device), a)


if __name__ == "__main__":
    main()
