"""A global value model's value of every token, as a picture (DVPO, figure 4): one HTML page, and one PNG beside it.

    python eval/token_values.py --gvm runs/gvm/final --data graded.jsonl --prompts 3
    python eval/token_values.py --gvm runs/gvm/final --prompt "how is the soup ?" --response "it is good ." "bad ."

Each token stands in a box with its Q(tau, s_t, a_t) below, coloured from orange (below) over white to blue (above the
mean). Numbers are in standard deviations of the training grades: 0 is the mean grade. One colour scale for the page;
both ends are dark, so hue is for those who see it and the number for everyone. The first box is V(s_1), the value of
the prompt. tau are answers of the same policy to other prompts of --data, where the data has any.
"""

from __future__ import annotations

import random
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gvm
from eval import program, report, samples
from eval.report import Raw, esc, num

WIDTH = 11.0  # inches of the PNG
LINES = 60  # of boxes that the PNG has at most; the page has all


@dataclass(kw_only=True)
class Args:
    """Which model values which responses."""

    gvm: str = "runs/gvm/final"
    """the global value model's folder"""
    data: str = ""
    """graded rows or preference pairs to show, and to draw tau from; empty with --prompt"""
    split: str = "train"
    """the part of the data to read: `train`, `test`, `train[2000:4000]`"""
    prompts: int = 3
    """how many prompts of the data are shown: the first ones"""
    responses: int = 2
    """how many responses to each of them: from the best by score to the worst, evenly"""
    prompt: str = ""
    """show this prompt instead, with the responses of --response"""
    response: tuple[str, ...] = ()
    """responses to --prompt"""
    tau_pairs: int | None = None
    """question-answer pairs in tau; default: as in training"""
    max_prompt_tokens: int = 1024
    """a row with a longer prompt cannot be used"""
    max_response_tokens: int = 512
    """a longer response is cut"""
    skip_bad_rows: bool = False
    """leave out rows of your own file that cannot be used (as is done with hub data) instead of stopping at the first"""
    seed: int = 0
    """seed of the choice of tau"""
    bf16: bool = False
    """weights in bfloat16 (GPU)"""
    output_dir: str = "runs/token_values"
    """folder for token_values.html and token_values.png"""


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds. One that ends inside a character shows as …, the character with its last token."""
    found, shown = [], ""
    for t in range(len(ids)):
        text = tokenizer.decode(ids[: t + 1])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and t + 1 < len(ids):
            found.append("…")
        else:
            found.append(text[len(shown) :])
            shown = text
    return found


def visible(piece: str) -> str:
    """Line breaks as ⏎; outer blanks, which the boxes replace, left out."""
    return piece.replace("\n", "⏎").strip() or "␣"


def evenly(items: list, n: int) -> list:
    """n of them, the first and the last among them."""
    return items if len(items) <= n else [items[round(i * (len(items) - 1) / max(1, n - 1))] for i in range(n)]


def boxes(words: list[str], q, limit: float) -> Raw:
    """Tokens as they run, each with its value below it."""
    found = []
    for t, (word, value) in enumerate(zip(words, q, strict=True)):
        background, ink = report.colours(value, limit)
        css = "w start" if t == 0 else "w"
        found.append(f'<span class="t"><span class="{css}" style="background:{background};color:{ink}">'
                     f"{esc(visible(word) if t else word)}</span>"
                     f"<small>{num(value, 2, True)}</small></span>")  # fmt: skip
        if "\n" in word:
            found.append("<br>")
    return Raw('<div class="run">' + "".join(found) + "</div>")


CSS = """
main{max-width:1060px}
.run{line-height:1;margin:.3rem 0 1.2rem}
.t{display:inline-block;text-align:center;margin:0 2px 7px 0;vertical-align:top;max-width:100%}
.t small{display:block;font-size:.66rem;color:var(--soft);font-variant-numeric:tabular-nums;margin-top:3px}
.w{display:block;border-radius:4px;padding:.28rem .32rem;font-size:.9rem;min-width:2.1rem;overflow-wrap:anywhere}
.start{font-style:italic}
.prompt{white-space:pre-wrap;overflow-wrap:anywhere;max-height:11rem;overflow-y:auto;background:var(--panel);
  padding:.6rem .8rem;border-radius:6px;max-width:none}
"""


def page(shown: list[dict], limit: float, who: str) -> str:
    stops = ",".join(report.colours(limit * x, limit)[0] for x in np.linspace(-1, 1, 9))
    parts = [
        Raw("<h1>Values of single tokens</h1>"),
        report.p(f"Each box is a token and, below it, Q: what the value model {who} expects in the end, once the token "
                 "stands there, in standard deviations of the grades it was trained on; 0 is their mean. The first "
                 "box is the prompt's own value."),
        Raw(f'<div class="legend"><span>{num(-limit, 1)}</span>'
            f'<i style="background:linear-gradient(90deg,{stops})"></i>'
            f"<span>+{num(limit, 1)}</span></div>"),
    ]  # fmt: skip
    for i, case in enumerate(shown, 1):
        body = [report.p(case["prompt"], "prompt")]
        for line in case["lines"]:
            grade = "" if line["score"] is None else f", grade {num(line['score'], 2, True)}"
            body += [report.p(f"{line['policy'] or 'response'}{grade}: mean Q {num(line['q'][1:].mean(), 2, True)}, "
                              f"last {num(line['q'][-1], 2, True)}", "side"),
                     boxes(line["words"], line["q"], limit)]  # fmt: skip
        parts.append(report.section(f"prompt{i}", f"Prompt {i}", *body))
    return report.whole("Token values", parts, CSS)


def draw(shown: list[dict], limit: float, ink: str) -> Figure:
    """The page's boxes as one picture, LINES lines at most."""
    unit, gap, row = 0.088, 0.05, 0.46  # inches: of a letter, between boxes, of a line
    things, y = [], 0.25
    for case in shown:
        title = " ".join(case["prompt"].split())
        things.append(("title", y, 0, title if len(title) < 118 else title[:115] + "…", None))
        y += 0.3
        for line in case["lines"]:
            grade = "" if line["score"] is None else f", grade {num(line['score'], 2, True)}"
            things.append(("side", y, 0, f"{line['policy'] or 'response'}{grade}", None))
            y, x = y + 0.3, 0.0
            for word, value in zip(line["words"], line["q"], strict=True):
                word = visible(word)
                word = word if len(word) < 60 else word[:57] + "…"
                width = max(0.42, unit * len(word) + 0.12)
                if x + width > WIDTH - 0.3:
                    x, y = 0.0, y + row
                things.append(("box", y, (x, width), word, value))
                x += width + gap
            y += row + 0.1
        y += 0.12
    height = min(y, row * LINES)
    figure = Figure((WIDTH, height))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(-0.15, WIDTH - 0.15), ylim=(-height, 0))
    axis.axis("off")
    for kind, y, x, text, value in things:
        if y > height - 0.2:
            break
        if kind != "box":
            axis.text(0, -y, text, va="center", fontsize=10.5 if kind == "title" else 9,
                      fontweight="bold" if kind == "title" else "normal")  # fmt: skip
            continue
        background, colour = report.colours(value, limit)
        corner = (x[0] + 0.02, -y - 0.09)
        axis.add_patch(
            FancyBboxPatch(corner, x[1] - 0.04, 0.18, boxstyle="round,pad=0.02", facecolor=background, linewidth=0)
        )
        axis.text(x[0] + x[1] / 2, -y, text, ha="center", va="center", fontsize=8.5, color=colour)
        axis.text(x[0] + x[1] / 2, -y - 0.2, num(value, 2, True), ha="center", va="center", fontsize=6.5, color=ink)
    return figure


def cases(args: Args) -> list[dict]:
    """The prompts that are shown: their text, and of each response the words, values, grade and policy."""
    gvm.missing(args.gvm, "python gvm.py")
    loading, rng = samples.settings(args), random.Random(args.seed)
    tokenizer = gvm.load_tokenizer(args.gvm, loading)
    model = gvm.load_model("value", args.gvm, tokenizer, loading, frozen=True)
    pool, by_policy = gvm.load_answers(tokenizer, args) if args.data else [], {}
    for answer in pool:
        by_policy.setdefault(answer.policy, []).append(answer)
    if args.prompt:
        if not args.response:
            gvm.stop("--prompt needs responses to show: give --response TEXT [TEXT ...]")
        read = lambda text: gvm.response_ids(tokenizer, text, args)
        groups = [[gvm.Answer(samples.messages(args.prompt), read(text)) for text in args.response]]
    elif pool:
        keys = list(dict.fromkeys(answer.key for answer in pool))[: args.prompts]
        groups = [sorted((a for a in pool if a.key == key), key=lambda a: -a.score) for key in keys]
        groups = [evenly(group, args.responses) for group in groups]
    else:
        gvm.stop("nothing to show: give --data, or --prompt and --response")
    pairs = getattr(model.config, "tau_pairs", 0) if args.tau_pairs is None else args.tau_pairs
    with_tau = [
        gvm.choose_tau(by_policy.get(a.policy, []), a, pairs, rng) + [a] for group in groups for a in group
    ]  # fmt: skip
    reading = gvm.Args(tau_tokens=getattr(model.config, "tau_tokens", 0))
    values = iter(
        gvm.predict(gvm.ValueModel(model).to(samples.device()), tokenizer, with_tau, reading, samples.device())
    )
    return [
        {"prompt": samples.show(group[0].prompt), "lines": [
            {"words": ["prompt", *pieces(tokenizer, a.response)], "q": next(values), "policy": a.policy,
             "score": None if np.isnan(a.score) else a.score}
            for a in group
        ]}
        for group in groups
    ]  # fmt: skip


@program
def main(argv=None):
    args = samples.read_flags(Args, argv, __doc__)
    shown, folder = cases(args), Path(args.output_dir)
    limit = max(np.abs(line["q"]).max() for case in shown for line in case["lines"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "token_values.html").write_text(page(shown, limit, args.gvm), encoding="utf-8")
    warnings.filterwarnings("ignore", "Glyph .* missing")  # it is drawn as a frame; the page shows it
    report.png(draw, shown, limit, path=folder / "token_values.png")
    for case in shown:
        print(f"prompt: {' '.join(case['prompt'].split())[:70]}")
        print(samples.table(("", "grade", "mean Q", "last Q", "tokens"), [
            (f"  {line['policy'] or 'response'}", "-" if line["score"] is None else f"{line['score']:.2f}",
             f"{line['q'][1:].mean():+.2f}", f"{line['q'][-1]:+.2f}", len(line["q"]) - 1)
            for line in case["lines"]
        ]))  # fmt: skip
    print(f"{folder / 'token_values.html'} and {folder / 'token_values.png'} written")


if __name__ == "__main__":
    main()
