"""Time, memory and gradient error of the LM head's log-prob, beside its matrix products and other implementations.

    python bench/kernels.py                     # on the GPU if there is one, else on the CPU
    python bench/kernels.py --device cpu        # one shape, fp32, about three minutes on two cores
    python bench/kernels.py --show bench/results/cpu.json

Per case (N tokens, D hidden, V vocabulary, and what is trained): a no-grad forward, and a forward with backward for
both hidden states and weight under random per-token weights; logits have a standard deviation of 4. A time stands beside
its ratio to the matrix products that the method needs, which are timed in the same run: 1 for a forward; 3 for forward
and backward where logits or their gradient are kept, 4 where the backward computes them again (`linear_logprob`: but for
its last slice); one less where the head is frozen. Rounds go through all methods in turn, so that a change of clock or
load meets all alike; the figure is the median round. Memory is the peak over what was there before the call, gradients
included: the allocator's on CUDA, the process's resident set on a CPU. The gradient error is |d - d64| / |d64|, norms
over the whole of dHidden and of dWeight, d64 in fp64. What fails (memory, a package that does not run here) costs one
cell.

Methods: plain torch (logits, log_softmax, gather), the same under torch.compile, F.linear_cross_entropy (whole and
chunked), and where they are installed Liger's fused linear cross-entropy (as it is, and adding up in fp32) and its
per-token one, cut-cross-entropy (as it is, which drops small gradients, and without that filter) and TRL's chunked
log-prob. Liger's first two and torch's chunked one give a summed loss without token weights: their rows belong beside
`linear_nll`.

Writes bench/results/<device>.json: every round, the machine, versions, commit and date, and the targets.
"""

import argparse
import contextlib
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
from bench import step
from kernels import linear_logprob, linear_nll
from kernels.logprob import operand_dtype, vocabulary_slices, workspace_bytes

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
SETTINGS = {
    "all trained": "hidden states and weight of one dtype",
    "fp32 weight": "a weight of fp32, hidden states of bf16, forward under bf16 autocast",
    "frozen head": "no gradient for the weight",
}
CASES = {
    "cpu": [(2048, 512, 32000, "all trained")],
    "cuda": [
        (8192, 4096, 128256, "all trained"),
        (8192, 2048, 128256, "all trained"),
        (4096, 576, 49152, "all trained"),
    ]
    + [(2048, 3072, 128256, setting) for setting in SETTINGS],  # what a micro-batch of the 3B preset brings
}
LOGIT_STD = 4  # at 1 no token has a probability to speak of, and cut-cross-entropy filters half of the gradient out
ENTROPY = 0.01


# --- Methods: (hidden, weight, target, token_weight) → summed loss -----------------------------------------------------


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


def liger_fp32(h, w, t, g):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)(w, h, t)


def liger_per_token(h, w, t, g):
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return (LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, t) * g).sum()


def cut_cross_entropy(h, w, t, g):
    from cut_cross_entropy import linear_cross_entropy

    return (linear_cross_entropy(h, w, t, reduction="none") * g).sum()


def cut_cross_entropy_unfiltered(h, w, t, g):
    from cut_cross_entropy import linear_cross_entropy

    return (linear_cross_entropy(h, w, t, reduction="none", filter_eps=None) * g).sum()


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
    return -((logp + ENTROPY * entropy) * g).sum()


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


METHODS = {  # name: the method; the products of forward and backward
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
    "Liger, fp32 accumulator": (liger_fp32, 3),
    "Liger, per token": (liger_per_token, 4),
    "cut-cross-entropy": (cut_cross_entropy, 4),
    "cut-cross-entropy, unfiltered": (cut_cross_entropy_unfiltered, 4),
    "TRL chunked": (trl, 4),
}
PACKAGES = {liger: "liger-kernel", liger_fp32: "liger-kernel", liger_per_token: "liger-kernel"}
PACKAGES |= {cut_cross_entropy: "cut-cross-entropy", cut_cross_entropy_unfiltered: "cut-cross-entropy", trl: "trl"}
UNWEIGHTED = torch_chunked, liger, liger_fp32


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
        before = step.resident("VmRSS")
    except (OSError, AttributeError):
        return None
    call()
    return max(step.resident("VmHWM") - before, 0)


def reference(hidden, weight, target, token_weight, entropy):
    """dHidden and dWeight (None where not trained) of -Σ token_weight (logp + entropy · H) in fp64, by its formula."""
    h, w, g = hidden.detach().double(), weight.detach().double(), token_weight.double()[:, None]
    dh = torch.empty_like(h) if hidden.requires_grad else None
    dw = torch.zeros_like(w) if weight.requires_grad else None
    for rows in torch.arange(len(h), device=h.device).split(1024):
        log_p = torch.log_softmax(h[rows] @ w.t(), -1)
        p = log_p.exp()
        d = p * g[rows]
        if entropy:
            d.mul_(1 + entropy * (log_p - (p * log_p).sum(1, keepdim=True)))
        d.scatter_add_(1, target[rows][:, None], -g[rows])
        if dh is not None:
            dh[rows] = d @ w
        if dw is not None:
            dw += d.t() @ h[rows]
    return dh, dw


def measure(case, device, rounds, skip):
    n, d, v, setting = case
    dtype = torch.bfloat16 if setting == "fp32 weight" else DTYPES[device]
    weight_dtype = torch.float32 if setting == "fp32 weight" else dtype
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=gen).to(device, dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=gen) * (LOGIT_STD / d**0.5)).to(device, weight_dtype)
    weight.requires_grad_(setting != "frozen head")
    target = torch.randint(v, (n,), generator=gen).to(device)
    token_weight = torch.rand(n, generator=gen).to(device)

    def autocast():
        return torch.autocast(device, torch.bfloat16) if setting == "fp32 weight" else contextlib.nullcontext()

    def forward(method):
        with torch.no_grad(), autocast():
            method(hidden, weight, target, token_weight)

    def both(method):
        hidden.grad = weight.grad = None
        with autocast():
            loss = method(hidden, weight, target, token_weight)
        loss.backward()

    # The products alone, and a copy, in buffers that stay (and so count in nobody's memory).
    with autocast():
        operands = operand_dtype(hidden, weight)
    h, w = hidden.detach().to(operands), weight.detach().to(operands)
    slices = len(vocabulary_slices(h, weight, operands))
    logits = torch.zeros(n, v, dtype=operands, device=device)
    dh, dw = torch.empty_like(h), torch.empty_like(w)
    products = {
        "hidden @ weight.T": lambda: torch.mm(h, w.t(), out=logits),
        "dlogits @ weight": lambda: torch.mm(logits, w, out=dh),
        "dlogits.T @ hidden": lambda: torch.mm(logits.t(), h, out=dw),
    }
    half = logits.numel() // 2
    one, other = logits.view(-1)[:half], logits.view(-1)[half : 2 * half]
    gemm, copies = {name: [] for name in products}, []
    methods, rows = {}, {}

    def attempt(name, cell, call):
        """What call() returns; where it fails, a note in this one cell, and None."""
        try:
            return call()
        except Exception as e:
            text = str(e).splitlines()[0][:200] if str(e) else ""
            rows[name]["failed"][cell] = f"{type(e).__name__}: {text}"
        finally:
            hidden.grad = weight.grad = None
        # Only here, where the exception and its frames are gone, is their memory free.
        gc.collect()
        if device == "cuda":
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()
        return None

    def time_one(name, kind, call):
        rows[name][kind].append(seconds(call, device))

    kinds = {"forward": forward, "both": both}
    for name, (method, count) in METHODS.items():
        # In fp32 these are the same as the rows without: logits are fp32 anyway, and so is the weight's accumulator.
        if name in skip or (operands == torch.float32 and method in (ours_fp32_logits, nll_one_chunk)):
            continue
        if method in PACKAGES and version(PACKAGES[method]) is None:
            rows[name] = {"status": "not installed"}
            continue
        if name == "torch.compile of it":
            torch._dynamo.reset()
            method = torch.compile(plain)
        count -= setting == "frozen head"
        rows[name] = {"products": count, "memory": {}, "forward": [], "both": [], "error": None, "failed": {}}
        methods[name] = method
        for kind, call in kinds.items():  # once each: compiles, and finds out what does not run here
            run = lambda call=call, method=method: call(method)
            attempt(name, kind, run)
            if kind not in rows[name]["failed"]:
                rows[name]["memory"][kind] = attempt(name, kind, lambda run=run: peak_bytes(run, device))
    for _ in range(rounds):
        for name, call in products.items():
            gemm[name].append(seconds(call, device))
        copies.append(seconds(lambda: one.copy_(other), device))
        for name, method in methods.items():
            for kind, call in kinds.items():
                if kind not in rows[name]["failed"]:
                    attempt(name, kind, lambda: time_one(name, kind, lambda: call(method)))  # noqa: B023

    def error_of(method, exact):
        both(method)
        found = {}
        for part, x, want in (("hidden", hidden, exact[0]), ("weight", weight, exact[1])):
            if want is not None:
                found[part] = ((x.grad - want).norm() / want.norm()).item()
        return found

    for unweighted, entropy in ((False, 0), (False, ENTROPY), (True, 0)):
        of_this_loss = [
            name for name, method in methods.items()
            if (method in UNWEIGHTED, ENTROPY if method is ours_entropy else 0) == (unweighted, entropy)
            and "both" not in rows[name]["failed"]
        ]  # fmt: skip
        exact = None
        for name in of_this_loss:
            if exact is None:
                g = torch.ones_like(token_weight) if unweighted else token_weight
                exact = attempt(name, "error", lambda: reference(hidden, weight, target, g, entropy))  # noqa: B023
            if exact is not None:
                rows[name]["error"] = attempt(name, "error", lambda: error_of(methods[name], exact))  # noqa: B023
    for row in rows.values():
        row.setdefault(
            "status", "; ".join(f"{cell} failed: {text}" for cell, text in row.get("failed", {}).items()) or "ok"
        )
    # Bytes that pass through memory in a copy of one half to the other are those of the whole.
    bandwidth = 2 * half * logits.element_size() / statistics.median(copies)
    return {
        "n": n, "d": d, "v": v, "setting": setting, "dtype": str(dtype).removeprefix("torch."), "slices": slices,
        "operands": str(operands).removeprefix("torch."), "gemm": gemm, "bytes_per_second": bandwidth, "methods": rows,
    }  # fmt: skip


# --- Targets, tables, the file -----------------------------------------------------------------------------------------


def gemm_times(result):
    """Seconds of 1 product, of 3, and of 4 (the fourth is the forward's, again); of 2 and 3 with a frozen head."""
    first, second, third = (statistics.median(x) for x in result["gemm"].values())
    if result["setting"] == "frozen head":
        return {1: first, 2: first + second, 3: 2 * first + second}
    return {1: first, 3: first + second + third, 4: 2 * first + second + third}


def median(row, kind):
    """Seconds of a cell, None where it failed."""
    return statistics.median(row[kind]) if row.get(kind) and kind not in row["failed"] else None


def targets(result, device, workspace):
    """What this project promises of the case, each with its measured value and whether it is met. What was not measured
    is not promised."""
    rows = result["methods"]
    log, nll, torch_ = "linear_logprob", "linear_nll (weights known)", "plain torch"
    out = []

    def time_of(name, kind):
        return median(rows.get(name, {}), kind)

    def memory(name):
        return rows.get(name, {}).get("memory", {}).get("both")

    def add(what, value, unit, limit):
        if value and unit:
            out.append({"what": what, "value": value / unit, "limit": limit, "met": value / unit <= limit})

    if device == "cpu":
        add("no-grad forward / plain torch", time_of(log, "forward"), time_of(torch_, "forward"), 1)
        add("known weights, forward + backward / plain torch", time_of(nll, "both"), time_of(torch_, "both"), 1)
        add("forward + backward / plain torch", time_of(log, "both"), time_of(torch_, "both"), 1.35)
        add("extra memory / plain torch", memory(log), memory(torch_), 0.25)
        add("extra memory, known weights / plain torch", memory(nll), memory(torch_), 0.25)
    else:
        n, d, v, trained = result["n"], result["d"], result["v"], result["setting"] != "frozen head"
        size = {"bfloat16": 2, "float32": 4}
        hidden, operand = size[result["dtype"]], size[result["operands"]]
        weight = 4 if result["setting"] == "fp32 weight" else hidden
        first, second, third = (statistics.median(x) for x in result["gemm"].values())
        products = first + second + third * trained
        # The logits are read once in a forward; their gradient takes one reading and one writing more.
        one_pass = n * v * operand / result["bytes_per_second"]
        scaling = 2 * v * d * weight * trained / result["bytes_per_second"]  # of dWeight by the upstream scalar
        again = first * (1 - 1 / result["slices"])
        add("forward / (product + 1 pass)", time_of(log, "forward"), first + one_pass, 1.05)
        add("forward + backward / (products + 3 passes)", time_of(log, "both"), products + again + 3 * one_pass, 1.05)
        add(
            "known weights / (products + 3 passes + scaling)",
            time_of(nll, "both"),
            products + 3 * one_pass + scaling,
            1.05,
        )
        small = 64 * n + 2**20  # statistics, upstream gradients, the allocator's rounding
        limit = workspace + n * d * (4 + hidden) + v * d * weight * trained + small
        add("memory / (workspace + gradients)", memory(log), limit, 1)
        accumulator = 4 * v * d * trained
        converted = v * d * operand * (weight != operand)
        narrow = v * d * weight * trained * (weight != 4)
        limit = max(workspace + accumulator + converted, accumulator + narrow) + n * d * hidden + small
        add("memory, known weights / (workspace + gradients)", memory(nll), limit, 1)
        for name, mine in (("Liger", nll), ("Liger, fp32 accumulator", nll), ("Liger, per token", log),
                           ("cut-cross-entropy, unfiltered", log), ("TRL chunked", log)):  # fmt: skip
            add(f"{mine} / {name}, forward + backward", time_of(mine, "both"), time_of(name, "both"), 1)
    return out


def show(report):
    def cell(row, kind, gemm):
        middle = median(row, kind)
        return "failed" if middle is None else f"{1e3 * middle:.1f} ({middle / gemm:.2f})"

    def mib(size):
        return "not measured" if size is None else f"{size / 2**20:.0f}"

    print(f"{report['machine']['device']}, torch {report['versions']['torch']}, {report['date']}, "
          f"commit {report['commit']}, load before {report['machine']['load_before']}")  # fmt: skip
    for result in report["shapes"]:
        print(f"\nN {result['n']}, D {result['d']}, V {result['v']}, {result['setting']}")
        if "failed" in result:
            print(f"failed: {result['failed']}")
            continue
        gemm = gemm_times(result)
        print(f"{result['dtype']}; milliseconds (ratio to the products)")
        print(f"{', '.join(map(str, gemm))} products: {', '.join(f'{1e3 * x:.1f}' for x in gemm.values())}\n")
        print(
            "| method | forward | forward + backward | products | MiB forward | MiB with backward | error of dh, dW |"
        )
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for name, row in result["methods"].items():
            if "products" not in row:
                print(f"| {name} | {row['status']} | | | | | |")
                continue
            error = ", ".join(f"{x:.1e}" for x in (row["error"] or {}).values()) or "not measured"
            peaks = " | ".join(mib(row["memory"].get(kind)) for kind in ("forward", "both"))
            print(f"| {name} | {cell(row, 'forward', gemm[1])} | {cell(row, 'both', gemm[row['products']])} | "
                  f"{row['products']} | {peaks} | {error} |")  # fmt: skip
        print()
        for name, row in result["methods"].items():
            if row["status"] not in ("ok", "not installed"):
                print(f"{name}: {row['status']}")
        for t in result["targets"]:
            print(f"{'met   ' if t['met'] else 'MISSED'} {t['what']}: {t['value']:.3f} (at most {t['limit']})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "D", "V"), help="this one instead of the device's")
    parser.add_argument("--setting", choices=SETTINGS, default="all trained", help="of --shape: " + "; ".join(
        f"{name}: {what}" for name, what in SETTINGS.items()))  # fmt: skip
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
    cases = [(*args.shape, args.setting)] if args.shape else CASES[args.device]
    workspace = workspace_bytes(torch.device(args.device))
    machine = {"device": step.cpu_name(), "threads": torch.get_num_threads(), "load_before": load}
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
        "commit": step.commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "workspace_bytes": workspace,
        "shapes": [],
    }
    out = args.out or (None if args.shape else ROOT / "bench" / "results" / f"{args.device}.json")
    for case in cases:
        try:
            result = measure(case, args.device, rounds, args.skip)
            result["targets"] = targets(result, args.device, workspace)
        except RuntimeError as e:  # no memory for what all methods share
            result = dict(zip(("n", "d", "v", "setting"), case)) | {"failed": str(e).splitlines()[0]}
        report["shapes"].append(result)
        machine["load_after"] = [round(x, 2) for x in os.getloadavg()]
        if out:  # now: what comes later may end the process
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n")
        if args.device == "cuda":
            torch.cuda.empty_cache()
    show(report)
    if out:
        print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
