"""Every Triton kernel of kernels/, compiled for an A100 and an H100 as the code launches it; needs no GPU.

    python bench/aot.py                     # all cases, about two minutes
    python bench/aot.py --core              # those of tests/test_aot.py

The launching functions themselves run, on CPU tensors with the dtype, stride and alignment that a GPU's would have,
under a driver that stands for the GPU; Triton compiles and does not launch. So the specialisation (what is a multiple of
16, what is 1), the constants and the number of warps are those of a real call.

Per case: registers of a thread and its bytes of local memory (spilled registers; cuobjdump says both of the machine
code), shared memory, and the global loads and stores of the PTX by width: `v4.b32` is 16 bytes.

Writes bench/results/aot.json.
"""

import argparse
import collections
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import logprob, values, vcb

ROOT = Path(__file__).resolve().parent.parent
CAPABILITIES = 80, 90
PAIRS_OF_DTYPES = (  # of the logits and their gradient
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
)
ALIGNED, ODD = 32128, 50257  # widths: a slice of a vocabulary, and GPT-2's whole one


# --- Compiling without a GPU -------------------------------------------------------------------------------------------


class Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # kernels are cached by device: each architecture is one

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiling(capability: int):
    """A list of (kernel's name, compiled kernel) that each launch in this context is added to, in place of running."""
    compiled, run, active = [], JITFunction.run, driver._active  # not `driver.active`: there may be no GPU to drive

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(Driver(capability))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active


def resources(cubin: bytes) -> dict:
    """Registers of a thread and bytes of its local memory: its stack, which is where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}
    return {"registers": found["REG"], "local_bytes": found["STACK"] + found["LOCAL"]}


def accesses(ptx: str) -> dict:
    """How many global loads and stores of each width stand in the PTX: {"ld v4.b32": 2, "st b32": 1, ...}."""
    found = collections.Counter()
    for kind, suffix in re.findall(r"\b(ld|st)\.global((?:\.[\w:]+)*)", ptx):
        found[f"{kind} " + ".".join(x for x in suffix.split(".") if re.fullmatch(r"v\d+|[bfsu]\d+", x))] += 1
    return dict(sorted(found.items()))


# --- Cases -------------------------------------------------------------------------------------------------------------


def name_of(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def row_cases(core: bool):
    """The passes over logits: in the workspace, whose rows are aligned for any width, and in a caller's tensor."""

    def pair(logits, out, softcap, entropy):
        target = torch.zeros(len(logits), dtype=torch.long)
        state, g = logprob.new_state(target, torch.float32), torch.zeros(len(logits))
        return {
            "stats": lambda: logprob.stats_triton(logits, 0, target, state, 0.7, softcap, entropy),
            "grad": lambda: logprob.grad_triton(logits, 0, target, state, g, g if entropy else None, 0.7, softcap, out),
        }

    def workspace(width, dtype):
        return logprob.Workspace(8, width, torch.empty(0), dtype).view(8, width)

    for width in (ALIGNED, ODD) if core else (100, ALIGNED, ODD):
        for dtype, out_dtype in PAIRS_OF_DTYPES:
            for softcap, entropy in ((None, False), (None, True), (30.0, False), (30.0, True)):
                if core and ((softcap is None) == entropy or torch.float16 in (dtype, out_dtype)):
                    continue
                logits = workspace(width, dtype)
                out = logits if out_dtype == dtype else workspace(width, out_dtype)
                case = f"width {width}{', soft cap' if softcap else ''}{', entropy' if entropy else ''}"
                for kernel, launch in pair(logits, out, softcap, entropy).items():
                    if kernel == "grad":
                        yield f"{name_of(dtype)} to {name_of(out_dtype)}, {case}", launch
                    elif out_dtype == dtype:
                        yield f"{name_of(dtype)}, {case}", launch
    for dtype in (torch.bfloat16,) if core else (torch.bfloat16, torch.float16, torch.float32):
        logits = torch.zeros(8, ODD, dtype=dtype)
        for launch in pair(logits, torch.empty_like(logits), None, False).values():
            yield f"{name_of(dtype)}, token_logprob, width {ODD}", launch


def other_cases(core: bool):
    for dtype in (torch.bfloat16,) if core else (torch.bfloat16, torch.float16, torch.float32):
        v, mask, one = torch.zeros(5000, dtype=dtype), torch.ones(5000, dtype=torch.bool), torch.ones(()).double()
        yield name_of(dtype), lambda v=v, mask=mask: values.moments_triton(v, mask)
        yield name_of(dtype), lambda v=v, mask=mask, one=one: values.apply_triton(v, mask, one, one, torch.empty(5000))
    for n in (8,) if core else (1, 2, 4, 8, 16, 32, 64):
        for pairs in vcb.PAIRS:
            x, mask = torch.zeros(3, n), torch.ones(3, n, dtype=torch.bool)
            yield f"{pairs}, {n} responses", lambda x=x, m=mask, p=pairs: vcb.VCBLoss.apply(x, x, x, m, 0.05, 1.0, p)


def compile_all(capability: int, core: bool) -> list[dict]:
    """A row per case, in a fixed order. What a kernel fails to compile with is raised."""
    rows = []
    with compiling(capability) as compiled:
        for case, launch in (*row_cases(core), *other_cases(core)):
            compiled.clear()
            launch()
            ((kernel, built),) = compiled
            assert f".target sm_{capability}" in built.asm["ptx"]
            rows.append(
                {"capability": capability, "kernel": kernel, "case": case}
                | resources(built.asm["cubin"])
                | {"num_warps": built.metadata.num_warps, "shared_bytes": built.metadata.shared}
                | {"accesses": accesses(built.asm["ptx"])}
            )
    return rows


def show(rows: list[dict]) -> None:
    print("| sm | kernel | case | registers | local bytes | shared bytes | warps | global loads and stores |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | --- |")
    for r in rows:
        text = ", ".join(f"{count} {kind}" for kind, count in r["accesses"].items())
        print(f"| {r['capability']} | {r['kernel']} | {r['case']} | {r['registers']} | {r['local_bytes']} | "
              f"{r['shared_bytes']} | {r['num_warps']} | {text} |")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", action="store_true", help="fewer cases; writes no file")
    args = parser.parse_args()
    rows = [row for capability in CAPABILITIES for row in compile_all(capability, args.core)]
    show(rows)
    if not args.core:
        out = ROOT / "bench" / "results" / "aot.json"
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        lines = ",\n".join(map(json.dumps, rows))  # a row a line
        out.write_text(
            json.dumps({"versions": versions, "rows": "ROWS"}).replace('"ROWS"', "[\n" + lines + "\n]") + "\n"
        )
        print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
