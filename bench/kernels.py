"""Time and memory of the LM head's log-prob, beside the matrix products it consists of and beside other implementations.

    python bench/kernels.py                     # on the GPU if there is one, else on the CPU
    python bench/kernels.py --device cpu        # one shape, fp32, about three minutes on two cores
    python bench/kernels.py --show bench/results/cpu.json

Per shape (N tokens, D hidden, V vocabulary): a no-grad forward, and a forward with backward for both hidden states and
weight under random per-token weights. A time stands beside its ratio to the matrix products that the method needs, which
are timed in the same run: 1 for a forward; 3 for forward and backward where logits or their gradient are kept, 4 where
the backward computes them again. Rounds go through all methods in turn, so that a change of clock or load meets all
alike; the figure is the median round. Memory is the peak over what was there before the call, gradients included: the
allocator's on CUDA, the process's resident set on a CPU.

Methods: plain torch (logits, log_softmax, gather), the same under torch.compile, F.linear_cross_entropy (whole and
chunked), and where they are installed Liger's fused linear cross-entropy, cut-cross-entropy and TRL's chunked log-prob.
Liger's and torch's chunked one give a summed loss: their rows belong beside `linear_nll`.

Writes bench/results/<device>.json: every round, the machine, versions, commit and date, and the targets.
"""

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import linear_logprob, linear_nll
from kernels.logprob import workspace_bytes

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"cpu": [(2048, 512, 32000)], "cuda": [(8192, 4096, 128256), (8192, 2048, 128256), (4096, 576, 49152)]}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


# --- Methods: (hidden, weight, target, token_weight) → summed loss; whether it is a log-prob; products with backward ---


def plain(h, w, t, g):
    logits = h @ w.t()
    return -(torch.log_softmax(logits.float(), -1).gather(1, t[:, None])[:, 0] * g).sum()


def torch_whole(h, w, t, g):
    return (F.linear_cross_entropy(h, w, t, reduction="none") * g).sum()


def torch_chunked(h, w, t, g):
    return F.linear_cross_entropy(h, w, t, reduction="sum", options=torch.nn.LinearCrossEntropyOptions())


def liger(h, w, t, g):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(w, h, t)


def cut_cross_entropy(h, w, t, g):
    from cut_cross_entropy import linear_cross_entropy

    return (linear_cross_entropy(h, w, t, reduction="none") * g).sum()


def trl(h, w, t, g):
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    return -(ChunkedLogProbFunction.apply(h, w, None, t, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())[0] * g).sum()


def ours(h, w, t, g):
    return -(linear_logprob(h, w, t) * g).sum()


def ours_fp32_logits(h, w, t, g):
    return -(linear_logprob(h, w, t, logits_dtype=torch.float32) * g).sum()


def ours_entropy(h, w, t, g):
    logp, entropy = linear_logprob(h, w, t, entropy=True)
    return -((logp + 0.01 * entropy) * g).sum()


def nll_one_chunk(h, w, t, g):
    """All tokens in one chunk: more workspace, but then bf16 weights need no fp32 accumulator (4 V D bytes)."""
    before = os.environ.get("KERNELS_WORKSPACE_MB")
    os.environ["KERNELS_WORKSPACE_MB"] = str(1 + len(t) * len(w) * h.element_size() / 2**20)
    try:
        return linear_nll(h, w, t, g)
    finally:
        os.environ.pop("KERNELS_WORKSPACE_MB")
        if before is not None:
            os.environ["KERNELS_WORKSPACE_MB"] = before


METHODS = {
    "linear_logprob": (ours, 4),
    "linear_logprob, entropy": (ours_entropy, 4),
    "linear_logprob, fp32 logits": (ours_fp32_logits, 4),
    "linear_nll (weights known)": (linear_nll, 3),
    "linear_nll, all tokens at once": (nll_one_chunk, 3),
    "plain torch": (plain, 3),
    "torch.compile of it": (None, 3),  # compiled anew for each shape
    "F.linear_cross_entropy": (torch_whole, 3),
    "F.linear_cross_entropy, chunked": (torch_chunked, 3),
    "Liger": (liger, 3),
    "cut-cross-entropy": (cut_cross_entropy, 4),
    "TRL chunked": (trl, 4),
}
PACKAGES = {"Liger": "liger-kernel", "cut-cross-entropy": "cut-cross-entropy", "TRL chunked": "trl"}


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- Measuring ---------------------------------------------------------------------------------------------------------


def seconds(call, device):
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def resident(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def peak_bytes(call, device):
    """Peak of what the call holds beyond what is there already; None where the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = resident("VmRSS")
        call()
        return max(resident("VmHWM") - before, 0)
    except (OSError, AttributeError, RuntimeError):
        return None


def measure(shape, device, rounds, skip):
    n, d, v = shape
    dtype = DTYPES[device]
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=gen).to(device, dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=gen) / d**0.5).to(device, dtype).requires_grad_()
    target = torch.randint(v, (n,), generator=gen).to(device)
    token_weight = torch.rand(n, generator=gen).to(device)

    def forward(method):
        with torch.no_grad():
            method(hidden, weight, target, token_weight)

    def both(method):
        hidden.grad = weight.grad = None
        method(hidden, weight, target, token_weight).backward()

    # The products alone, into buffers that stay (and so count in nobody's memory).
    h, w = hidden.detach(), weight.detach()
    logits = torch.empty(n, v, dtype=dtype, device=device)
    dh, dw = torch.empty_like(h), torch.empty_like(w)
    products = {
        "hidden @ weight.T": lambda: torch.mm(h, w.t(), out=logits),
        "dlogits @ weight": lambda: torch.mm(logits, w, out=dh),
        "dlogits.T @ hidden": lambda: torch.mm(logits.t(), h, out=dw),
    }
    calls, rows = {}, {}
    for name, (method, count) in METHODS.items():
        # In fp32 these are the same as the rows without: logits are fp32 anyway, and so is the weight's accumulator.
        if name in skip or (dtype == torch.float32 and method in (ours_fp32_logits, nll_one_chunk)):
            continue
        if name in PACKAGES and version(PACKAGES[name]) is None:
            rows[name] = {"status": "not installed"}
            continue
        if name == "torch.compile of it":
            torch._dynamo.reset()
            method = torch.compile(plain)
        try:  # once each: compiles, and finds out what does not run here
            memory = {}
            for kind, call in (("forward", forward), ("both", both)):
                call(method)
                hidden.grad = weight.grad = None
                memory[kind] = peak_bytes(lambda call=call, method=method: call(method), device)
                hidden.grad = weight.grad = None
        except Exception as e:
            rows[name] = {"status": f"failed: {type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"}
            hidden.grad = weight.grad = None
            continue
        rows[name] = {"status": "ok", "products": count, "memory": memory, "forward": [], "both": []}
        calls[name] = method
    gemm = {name: [] for name in products}
    for _ in range(rounds):
        for name, call in products.items():
            gemm[name].append(seconds(call, device))
        for name, method in calls.items():
            rows[name]["forward"].append(seconds(lambda method=method: forward(method), device))
            rows[name]["both"].append(seconds(lambda method=method: both(method), device))
            hidden.grad = weight.grad = None
    return {"n": n, "d": d, "v": v, "dtype": str(dtype).removeprefix("torch."), "gemm": gemm, "methods": rows}


# --- Targets, tables, the file -----------------------------------------------------------------------------------------


def gemm_times(result):
    """Seconds of 1, 3 and 4 products (the fourth is the forward's, again)."""
    first, second, third = (statistics.median(x) for x in result["gemm"].values())
    return {1: first, 3: first + second + third, 4: 2 * first + second + third}


def targets(result, device, workspace):
    """What this project promises of the shape, each with its measured value and whether it is met."""
    gemm, rows = gemm_times(result), result["methods"]
    time_of = {(name, kind): statistics.median(row[kind]) for name, row in rows.items() if row["status"] == "ok"
               for kind in ("forward", "both")}  # fmt: skip
    memory = {name: row["memory"]["both"] for name, row in rows.items() if row["status"] == "ok"}
    log, nll, torch_ = "linear_logprob", "linear_nll (weights known)", "plain torch"
    out = []

    def add(what, value, limit):
        out.append({"what": what, "value": value, "limit": limit, "met": value <= limit})

    if device == "cpu" and (log, "both") in time_of and (torch_, "both") in time_of:
        add("no-grad forward / plain torch", time_of[log, "forward"] / time_of[torch_, "forward"], 1)
        add("known weights, forward + backward / plain torch", time_of[nll, "both"] / time_of[torch_, "both"], 1)
        add("forward + backward / plain torch", time_of[log, "both"] / time_of[torch_, "both"], 1.35)
        if memory[torch_]:
            add("extra memory / plain torch", memory[log] / memory[torch_], 0.25)
            add("extra memory, known weights / plain torch", memory[nll] / memory[torch_], 0.25)
    if device == "cuda" and (log, "both") in time_of:
        add("forward / one product", time_of[log, "forward"] / gemm[1], 1.10)
        add("forward + backward / four products", time_of[log, "both"] / gemm[4], 1.12)
        add("known weights / three products", time_of[nll, "both"] / gemm[3], 1.12)
        n, d, v = result["n"], result["d"], result["v"]
        small = 64 * n + 2**20  # statistics, upstream gradients, the allocator's rounding
        add("memory / (workspace + gradients)", memory[log] / (workspace + 6 * n * d + 2 * v * d + small), 1)
        add(
            "memory, known weights / (workspace + gradients)",
            memory[nll] / (workspace + 2 * n * d + 6 * v * d + small),
            1,
        )
        for name, mine in (("Liger", nll), ("cut-cross-entropy", log), ("TRL chunked", log)):
            if (name, "both") in time_of:
                add(f"{mine} / {name}, forward + backward", time_of[mine, "both"] / time_of[name, "both"], 1)
    return out


def show(report):
    def cell(times, gemm):
        middle = statistics.median(times)
        return f"{1e3 * middle:.1f} ({middle / gemm:.2f})"

    def mib(size):
        return "not measured" if size is None else f"{size / 2**20:.0f}"

    print(f"{report['machine']['device']}, torch {report['versions']['torch']}, {report['date']}, "
          f"commit {report['commit']}, load before {report['machine']['load_before']}")  # fmt: skip
    for result in report["shapes"]:
        gemm = gemm_times(result)
        print(
            f"\nN {result['n']}, D {result['d']}, V {result['v']}, {result['dtype']}; milliseconds (ratio to the products)"
        )
        print(f"1, 3, 4 products: {', '.join(f'{1e3 * x:.1f}' for x in gemm.values())}\n")
        print("| method | forward | forward + backward | products | MiB forward | MiB with backward |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for name, row in result["methods"].items():
            if row["status"] != "ok":
                print(f"| {name} | {row['status']} | | | | |")
                continue
            print(f"| {name} | {cell(row['forward'], gemm[1])} | {cell(row['both'], gemm[row['products']])} | "
                  f"{row['products']} | {mib(row['memory']['forward'])} | {mib(row['memory']['both'])} |")  # fmt: skip
        print()
        for t in result["targets"]:
            print(f"{'met   ' if t['met'] else 'MISSED'} {t['what']}: {t['value']:.3f} (at most {t['limit']})")


def commit():
    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "kernels") else "")
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
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "D", "V"), help="this one instead of the device's")
    parser.add_argument("--rounds", type=int, help="default 7 on a CPU, 20 on a GPU")
    parser.add_argument("--skip", nargs="*", default=[], choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--out", type=Path, help="default bench/results/<device>.json; not written with --shape")
    parser.add_argument("--show", type=Path, help="print the tables of an earlier run, measure nothing")
    args = parser.parse_args()
    if args.show:
        show(json.loads(args.show.read_text()))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    load = [round(x, 2) for x in os.getloadavg()]
    rounds = args.rounds or {"cpu": 7, "cuda": 20}[args.device]
    shapes = [tuple(args.shape)] if args.shape else SHAPES[args.device]
    workspace = workspace_bytes(torch.device(args.device))
    machine = {"device": cpu_name(), "threads": torch.get_num_threads(), "load_before": load}
    if args.device == "cuda":
        machine["device"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            machine["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            machine["driver"] = None
        machine["cuda"] = torch.version.cuda
    report = {
        "machine": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": version("triton")}
        | {package: version(package) for package in PACKAGES.values()},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "workspace_bytes": workspace,
        "shapes": [],
    }
    for shape in shapes:
        result = measure(shape, args.device, rounds, args.skip)
        result["targets"] = targets(result, args.device, workspace)
        report["shapes"].append(result)
        if args.device == "cuda":
            torch.cuda.empty_cache()
    machine["load_after"] = [round(x, 2) for x in os.getloadavg()]
    show(report)
    out = args.out or (None if args.shape else ROOT / "bench" / "results" / f"{args.device}.json")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
