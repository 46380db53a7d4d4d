"""bench/aot.py: every Triton kernel compiles for an A100 and an H100 as launched, without spills, with wide accesses."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
triton = pytest.importorskip("triton")
import aot  # noqa: E402

FILE = json.loads((ROOT / "bench" / "results" / "aot.json").read_text())
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def check(row):
    assert row["registers"] > 0 and row["local_bytes"] == 0, row
    assert row["registers"] * 32 * row["num_warps"] <= 2**15, row  # two programs at least on a multiprocessor
    accesses, case = row["accesses"], row["case"]
    if row["kernel"] not in ("_stats_kernel", "_grad_kernel"):
        return
    if "token_logprob" in case:  # rows of an odd length are not aligned, whatever a kernel does
        assert not any("v4" in kind for kind in accesses), row
        return
    # 16 bytes at a time, in whole blocks (4096 columns, 256 threads) of any width.
    width = int(case.split("width ")[1].split(",")[0])
    dtypes = case.split(",")[0].split(" to ")
    if width < 4096:
        return
    for kind, dtype in zip(("ld", "st"), dtypes):
        assert accesses[f"{kind} v4.b32"] >= 16 * BYTES[dtype] / 16, row
        # Element by element: the last block of an odd width, and the target's logit.
        assert accesses.get(f"{kind} b16", 0) <= (1 if width % 16 == 0 else 17), row


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_core(capability):
    rows = aot.compile_all(capability, core=True)
    assert {row["kernel"] for row in rows} == {
        "_stats_kernel", "_grad_kernel", "_moments_kernel", "_apply_kernel", "_vcb_kernel",
    }  # fmt: skip
    for row in rows:
        check(row)


@pytest.mark.slow
@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_all(capability):
    rows = aot.compile_all(capability, core=False)
    for row in rows:
        check(row)
    committed = [row for row in FILE["rows"] if row["capability"] == capability]
    key = lambda row: (row["kernel"], row["case"])
    assert [key(row) for row in rows] == [key(row) for row in committed]
    if FILE["versions"]["triton"] == triton.__version__:
        assert rows == committed


def test_results():
    for row in FILE["rows"]:
        check(row)


def test_the_real_driver_comes_back():
    run, active = triton.runtime.jit.JITFunction.run, triton.runtime.driver._active
    with pytest.raises(KeyError), aot.compiling(90):
        raise KeyError
    assert triton.runtime.jit.JITFunction.run is run and triton.runtime.driver._active is active
