"""Time and memory of a step of each on-policy method, side by side: the same batch, each script's own train().

    python bench/step.py                                               # CPU: dvpo and ppo at the tiny shape
    python bench/step.py --algo dvpo,ppo,remax,rloo,grpo,reinforce++ --share_backbone --shape 100m
    python bench/step.py --shape llama3.2-1b                           # 1 GPU
    python bench/step.py --shape llama3.2-1b --nproc 8 --zero_stage 1
    python bench/step.py --show bench/results/step_cpu_tiny.json

Models have random weights of the shape and the same architecture throughout: policy, reference, GVM, reward model and
critic. Full fine-tuning, 4 epochs over each rollout, tau of one pair. Each method runs in a fresh process (or --nproc of
them); the first steps are warm-up and the figure is the median of the others.

Random models do not end a response reliably: `min_new_tokens` in the policy's generation config keeps EOS at -inf, for
sampling and greedy decoding alike, so every response has --response_tokens tokens and all methods do the same work.
Prompts are equally long. The tokenizer's words are as many as the model's tokens, so that a reward model that reads the
text again sees as many.

Seconds are the run's own columns (metrics.jsonl): rollout (generation), scoring (rewards, values, log-probs, advantages)
and update; on a GPU the clock waits for the device. Memory is the peak from the first rollout to the last update, over
the ranks the largest: of the allocator on a GPU; on a CPU of the resident set, less that of a process which has imported
the same modules and done nothing. Ratios are to PPO in the same call. `share_of_peak` (GPU) is the arithmetic that the
models need (2 per weight and token forward, 6 with backward) over that of a bf16 matrix product timed beside it.
"""

import argparse
import ctypes
import datetime
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import random
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {  # the model; responses of a rollout and of an optimizer step; tokens of a micro-batch, a prompt, a response; bf16
    "tiny": (
        {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 4},
        {"rollout_batch_size": 64, "batch_size": 32, "micro_tokens": 2048, "prompt_tokens": 24, "response_tokens": 32},
    ),
    "100m": (
        {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
         "num_attention_heads": 12, "num_key_value_heads": 12, "tie_word_embeddings": True},
        {"rollout_batch_size": 8, "batch_size": 4, "micro_tokens": 384, "prompt_tokens": 48, "response_tokens": 48},
    ),
    "llama3.2-1b": (
        {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
        {"rollout_batch_size": 64, "batch_size": 32, "micro_tokens": 4096, "prompt_tokens": 256, "response_tokens": 256,
         "bf16": True},
    ),
}  # fmt: skip
ALGOS = ("dvpo", "ppo", "remax", "rloo", "grpo", "reinforce++")
SHARED = "dvpo, shared backbone"
PHASES = ("rollout", "scoring", "update")


# --- Models and prompts of a shape, in a folder -------------------------------------------------------------------------


def word(i):
    return f"w{i}"


def tokenizer(vocabulary: int):
    """The toy world's tokenizer, with a word for every other id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    import toy

    special = (toy.PAD, toy.EOS, toy.UNK, toy.USER, toy.ASSISTANT)
    words = [*special, *map(word, range(len(special), vocabulary))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=toy.UNK))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=toy.PAD, eos_token=toy.EOS, unk_token=toy.UNK, padding_side="left",
        clean_up_tokenization_spaces=False, chat_template=toy.CHAT_TEMPLATE,
    )  # fmt: skip


def build(folder: Path, settings: dict):
    """policy/, rm/ and gvm/ (with the adapter that --share_backbone reads, if asked) and prompts.jsonl → parameters of the
    layers and of the LM head."""
    import torch
    import transformers

    import gvm
    import toy

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    tok, length = tokenizer(settings["model"]["vocab_size"]), settings["prompt_tokens"]
    config = toy.config(**settings["model"], max_position_embeddings=4096)
    dtype = torch.bfloat16 if settings["bf16"] else torch.float32
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder / "policy")
    body = sum(p.numel() for p in model.model.layers.parameters())
    head = config.vocab_size * config.hidden_size
    tau = {"tau_pairs": 1, "tau_tokens": 2 * (length + settings["response_tokens"])}
    for name, kind, extra in (("rm", "Sequence", {"reward_mean": 0.0, "reward_std": 1.0}), ("gvm", "Token", tau)):
        auto = getattr(transformers, f"LlamaFor{kind}Classification")
        model = auto.from_pretrained(folder / "policy", num_labels=1, dtype=dtype)
        if name == "gvm" and settings["share_backbone"]:
            args = SimpleNamespace(lora_r=8, bf16=settings["bf16"])
            model = gvm.add_lora(model, args, head="score")
            model.save_pretrained(folder / name / "adapter")
            model = model.merge_and_unload()
        for key, value in extra.items():
            setattr(model.config, key, value)
        model.save_pretrained(folder / name)
    for name in ("policy", "rm", "gvm"):
        tok.save_pretrained(folder / name)
    rng, words = random.Random(0), range(5, config.vocab_size)
    around = len(
        tok.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True, return_dict=False)
    )
    with open(folder / "prompts.jsonl", "w") as file:
        for _ in range(settings["rollout_batch_size"] * (settings["steps"] + settings["warmup"])):
            content = " ".join(word(rng.choice(words)) for _ in range(length - around))
            file.write(json.dumps({"prompt": content}) + "\n")
    return {"body": body, "head": head}


# --- One method, in processes of its own --------------------------------------------------------------------------------


def resident(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def forget_peak():
    """The high-water mark starts anew: what loading the models took for a moment is not a step's."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return  # then the peak since the process began


def peak() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        return resident("VmHWM:")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def script(algo: str) -> str:
    return {"dvpo": "dvpo", SHARED: "dvpo", "ppo": "ppo"}.get(algo, "reinforce")


def imported(algo: str, settings: dict):
    """The script that has the method, with everything imported that its run imports."""
    import transformers

    module = importlib.import_module(script(algo))
    importlib.import_module("transformers.models.llama.modeling_llama")
    assert transformers.AutoModelForCausalLM and transformers.AutoTokenizer and transformers.GenerationMixin
    if settings["zero_stage"] or settings["nproc"] > 1:
        importlib.import_module("deepspeed")
    if algo == SHARED:
        importlib.import_module("peft")
    return module


def worker(algo: str, folder: Path, settings: dict):
    """The method's steps, in a process of its own; the rank's peak memory goes into a file."""
    import torch

    module, rank = imported(algo, settings), int(os.environ.get("RANK", 0))
    found = folder / f"memory_{rank}.json"
    if settings["empty"]:
        found.write_text(json.dumps(peak()))
        return
    load, restore = module.load_model, module.Run.restore

    def load_model(kind, *args, **options):
        model = load(kind, *args, **options)
        if kind == "causal":
            model.generation_config.min_new_tokens = settings["response_tokens"]
        return model

    def restoring(run):
        restore(run)
        forget_peak()

    def finish(run, *_):
        run.flush()
        found.write_text(json.dumps(peak()))
        return run.folder

    def now():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.process_time() if settings["clock"] == "cpu" else time.time()

    module.load_model, module.Run.restore, module.Run.finish = load_model, restoring, finish
    module.time = SimpleNamespace(time=now, sleep=time.sleep)
    args = {name: settings[name] for name in ("rollout_batch_size", "batch_size", "micro_tokens", "zero_stage", "bf16",
                                              "gradient_checkpointing")}  # fmt: skip
    args |= {"policy": folder / "policy", "data": folder / "prompts.jsonl", "output_dir": folder / "run", "ppo_epochs": 4,
             "max_prompt_tokens": settings["prompt_tokens"], "max_response_tokens": settings["response_tokens"],
             "steps": settings["steps"] + settings["warmup"], "learning_rate": 1e-6}  # fmt: skip
    if module.__name__ == "dvpo":
        args |= {"gvm": folder / "gvm", "share_backbone": algo == SHARED}
    else:
        args |= {"reward_model": folder / "rm"} | (
            {"baseline": algo} if algo != "ppo" else {"critic_learning_rate": 1e-6}
        )
    module.train(module.Args(**{name: str(x) if isinstance(x, Path) else x for name, x in args.items()}))


def spawn(algo: str, folder: Path, settings: dict) -> list[int]:
    """Peak memory of each rank, bytes."""
    for path in folder.glob("memory_*.json"):
        path.unlink()
    program = [sys.executable]
    if settings["nproc"] > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        program += [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(settings["nproc"]),
            "--master_port",
            str(port),
        ]
    done = subprocess.run(
        [*program, __file__, "--worker", json.dumps([algo, str(folder), settings])],
        env={"OMP_NUM_THREADS": "1"} | os.environ | {"TQDM_DISABLE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{algo} failed:\n{done.stderr[-4000:]}")
    return [json.loads(path.read_text()) for path in sorted(folder.glob("memory_*.json"))]


def arithmetic(algo: str, settings: dict, size: dict) -> dict:
    """Operations of a rollout's step in each phase: 2 per weight and token forward, 6 with backward; no attention scores."""
    n, p, t = settings["rollout_batch_size"], settings["prompt_tokens"], settings["response_tokens"]
    body, policy = size["body"] * (p + t), size["body"] * (p + t) + size["head"] * t  # per response; weights x tokens
    with_tau = size["body"] * 2 * (p + t)
    others = {"dvpo": with_tau, SHARED: with_tau, "ppo": 2 * body, "remax": 2 * body}.get(algo, body)
    trained = policy + (body if algo == "ppo" else 0)
    return {
        "rollout": 2 * n * policy * (2 if algo == "remax" else 1),
        "scoring": 2 * n * (2 * policy + others),
        "update": 6 * n * trained * 4,
    }


def product_rate() -> float | None:
    """Operations per second of a large bf16 matrix product on the GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / statistics.median(times)


def measure(algo: str, folder: Path, settings: dict) -> tuple[dict, float]:
    """({phase: seconds of each measured step}, bytes of memory at their peak) of one process of its own."""
    empty = 0 if settings["on_gpu"] else spawn(algo, folder, settings | {"empty": True, "nproc": 1})[0]
    memory = max(spawn(algo, folder, settings | {"empty": False})) - empty
    run = folder / "run"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][settings["warmup"] :]
    short = [row for row in steps if row["length"] != settings["response_tokens"]]
    assert not short, f"{algo}: a response ended early, so this is not the work of the others: {short[0]}"
    for path in sorted(run.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    run.rmdir()
    rounds = {phase: [row[f"{phase}_seconds"] for row in steps] for phase in PHASES}
    rounds["total"] = [sum(x) for x in zip(*rounds.values(), strict=True)]
    return rounds, memory


def summary(algo: str, found: list[tuple[dict, float]], settings: dict, size: dict, rate: float | None) -> dict:
    """The medians over all steps of all rounds of a method."""
    rounds = {phase: [x for one, _ in found for x in one[phase]] for phase in found[0][0]}
    memory = statistics.median(x for _, x in found)
    seconds = {phase: round(statistics.median(x), 4) for phase, x in rounds.items()}
    tokens = settings["rollout_batch_size"] * settings["response_tokens"]  # response tokens, of each of the 4 epochs
    work = {"rollout": tokens, "scoring": tokens, "update": 4 * tokens}
    row = {
        "algo": "dvpo" if algo == SHARED else algo,
        "share_backbone": algo == SHARED,
        "shape": settings["shape"],
        "seconds": seconds,
        "peak_memory_mb": round(memory / 2**20, 1),
        "rollout_share": round(seconds["rollout"] / seconds["total"], 3),
        "tokens_per_second": {phase: round(work[phase] / max(seconds[phase], 1e-9)) for phase in PHASES},
        "rounds": rounds,
    }
    if rate:
        needed = arithmetic(algo, settings, size)
        row["share_of_peak"] = {
            phase: round(needed[phase] / settings["nproc"] / seconds[phase] / rate, 3) for phase in PHASES
        }
    return row


def add_ratios(rows: list[dict]):
    """Ratios to PPO's row of the same call. Of seconds: the median over pairs of steps with the same round and number, so that a
    slow minute of the machine is in both. None where there is no PPO."""
    of = next((row for row in rows if row["algo"] == "ppo"), None)
    parts = {"update": ["update"], "scoring_update": ["scoring", "update"], "total": ["total"]}

    def steps(row, names):
        return [sum(x) for x in zip(*(row["rounds"][name] for name in names), strict=True)]

    for row in rows:
        row["ratio_to_ppo"] = None
        if of:
            pairs = {key: zip(steps(row, names), steps(of, names), strict=True) for key, names in parts.items()}
            found = {key: statistics.median(x / ppo for x, ppo in steps) for key, steps in pairs.items()}
            found["memory"] = row["peak_memory_mb"] / of["peak_memory_mb"]
            row["ratio_to_ppo"] = {key: round(x, 3) for key, x in found.items()}


# --- The table, the file ------------------------------------------------------------------------------------------------


def show(report: dict):
    s = report["settings"]
    print(f"{report['device']}, {s['shape']}, {s['nproc']} process(es), ZeRO {s['zero_stage']}, torch "
          f"{report['versions']['torch']}, {report['date']}, commit {report['commit']}, load before "
          f"{report['machine']['load_before']}, after {report['machine']['load_after']}")  # fmt: skip
    print(f"{s['rollout_batch_size']} responses of {s['response_tokens']} tokens to prompts of {s['prompt_tokens']}, "
          f"batches of {s['batch_size']}, 4 epochs; seconds{' of processor time' * (s['clock'] == 'cpu')}, and in brackets ratios to PPO\n")  # fmt: skip
    print("| method | rollout | scoring | update | scoring + update | total | peak MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in report["rows"]:
        t, ratio = row["seconds"], row["ratio_to_ppo"] or {}

        def cell(value, key, digits=3, ratio=ratio):
            return f"{value:.{digits}f}" + (f" ({ratio[key]:.2f})" if ratio else "")

        name = SHARED if row["share_backbone"] else row["algo"]
        cells = [f"{t['rollout']:.3f}", f"{t['scoring']:.3f}", cell(t["update"], "update"),
                 cell(t["scoring"] + t["update"], "scoring_update"), cell(t["total"], "total"),
                 cell(row["peak_memory_mb"], "memory", 0)]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |")
    if any("share_of_peak" in row for row in report["rows"]):
        print("\nshare of a matrix product's rate (rollout, scoring, update)")
        for row in report["rows"]:
            name = SHARED if row["share_backbone"] else row["algo"]
            print(f"  {name}: {', '.join(map(str, row['share_of_peak'].values()))}")


def git(*args):
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def commit():
    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", default="dvpo,ppo", help=f"some of {','.join(ALGOS)}")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument(
        "--share_backbone", action="store_true", help="also dvpo with one backbone for reference and GVM"
    )
    parser.add_argument("--zero_stage", type=int, default=0, choices=range(4))
    parser.add_argument("--nproc", type=int, default=1, help="processes, each with a GPU if there are GPUs")
    parser.add_argument("--rounds", type=int, default=1, help="how often each method is measured, in turns")
    parser.add_argument("--steps", type=int, default=5, help="measured steps, each time")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    for name in ("rollout_batch_size", "batch_size", "micro_tokens", "prompt_tokens", "response_tokens"):
        parser.add_argument(f"--{name}", type=int, help="default by shape")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: the processor time of the process, "
                        "of all its threads together, which other work on the machine stretches less")  # fmt: skip
    parser.add_argument("--output", type=Path, help="default bench/results/step_<device>_<shape>.json")
    parser.add_argument("--show", type=Path, help="print the table of an earlier run, measure nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        algo, folder, settings = json.loads(args.worker)
        worker(algo, Path(folder), settings)
        return
    if args.show:
        show(json.loads(args.show.read_text()))
        return
    algos = args.algo.split(",")
    if unknown := [algo for algo in algos if algo not in ALGOS]:
        parser.error(f"--algo {unknown[0]}: choose from {', '.join(ALGOS)}")
    import torch

    model, sizes = SHAPES[args.shape]
    settings = {"bf16": False} | sizes | {key: x for key, x in vars(args).items() if x is not None and key in sizes}
    settings |= {key: getattr(args, key) for key in ("shape", "share_backbone", "zero_stage", "nproc", "rounds", "steps", "warmup", "clock",
                                                     "gradient_checkpointing")}  # fmt: skip
    cuda = torch.cuda.is_available()
    settings |= {"model": model, "ppo_epochs": 4, "on_gpu": cuda}
    if cuda and args.clock == "cpu":
        parser.error("--clock cpu: the work is the GPU's")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")  # else DeepSpeed says that it had to look
    device = torch.cuda.get_device_name() if cuda else cpu_name()
    machine = {"cpus": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS", "1"),
               "load_before": [round(x, 2) for x in os.getloadavg()]}  # fmt: skip
    rate = product_rate()
    if cuda:
        torch.cuda.empty_cache()
        machine |= {"cuda": torch.version.cuda, "product_tflops": round(rate / 1e12, 1)}
    with tempfile.TemporaryDirectory() as folder:
        size = build(Path(folder), settings)
        gc.collect()
        found = {algo: [] for algo in algos + [SHARED] * args.share_backbone}
        for number in range(args.rounds):  # a machine that others use is slower for minutes: methods take turns
            for algo in found:
                print(f"measuring {algo}, round {number + 1}", file=sys.stderr, flush=True)
                found[algo].append(measure(algo, Path(folder), settings))
        rows = [summary(algo, parts, settings, size, rate) for algo, parts in found.items()]
    add_ratios(rows)
    machine["load_after"] = [round(x, 2) for x in os.getloadavg()]
    packages = ("torch", "transformers", "deepspeed", "peft", "triton")
    found = {d.metadata["Name"].lower() for d in importlib.metadata.distributions() if d.metadata["Name"]}
    report = {
        "device": device,
        "rows": rows,
        "machine": machine,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) if name in found else None for name in packages},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "settings": settings,
    }
    show(report)
    out = args.output or ROOT / "bench" / "results" / f"step_{'cuda' if cuda else 'cpu'}_{args.shape}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
