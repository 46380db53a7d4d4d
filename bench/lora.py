"""A LoRA policy's rollout with the adapter beside the base, as the scripts draw, or merged for it and taken out after.

    python bench/lora.py                     # 100 M parameters, one thread of a CPU, about two minutes

Seconds of processor time for 8 responses of 32 tokens, rounds in turns; how far the base's weights are off after all merging
and taking out. Writes bench/results/lora_cpu.json.
"""

import datetime
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # first: this folder has a kernels.py of its own
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import toy
from bench import step

ROUNDS, RANK, RESPONSES, TOKENS = 5, 16, 8, 32


def timed(call) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = toy.config(**step.SHAPES["100m"][0], max_position_embeddings=4096)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zero at first: the adapter would change nothing
            torch.nn.init.normal_(weight, std=0.02)
    base = {name: weight.clone() for name, weight in model.named_parameters() if "base_layer" in name}
    ids = torch.randint(5, config.vocab_size, (RESPONSES, 48))
    lengths = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": 0, "eos_token_id": 1}
    rollout = lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, **lengths)
    seconds = {"beside": [], "merged": [], "merging": []}
    for turn in range(-1, ROUNDS):  # the first warms up
        found = {"beside": timed(rollout), "merging": timed(model.merge_adapter), "merged": timed(rollout)}
        found["merging"] += timed(model.unmerge_adapter)
        for name in seconds if turn >= 0 else ():
            seconds[name].append(round(found[name], 3))
    off = max(float((weight - base[name]).abs().max()) for name, weight in model.named_parameters() if name in base)
    report = {"seconds": seconds, "weights_off": off, "rank": RANK, "responses": RESPONSES, "tokens": TOKENS,
              "device": step.cpu_name(), "torch": torch.__version__, "commit": step.commit(),
              "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")}  # fmt: skip
    path = Path(__file__).parent / "results" / "lora_cpu.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
