"""A blind comparison by people: a sheet for the annotators, and the tally of their answers (VCB, section 5.5 and
table 3).

    python eval/human.py sheet --a vcb.jsonl --b dpo.jsonl --n 100 --output runs/human/sheet.html
    python eval/human.py tally --key runs/human/sheet.key.json --answers one.json two.json

The sheet is one HTML page that works offline: for each prompt two responses, left and right at random, and which is
better. Nothing in it tells who wrote what; that is in `sheet.key.json`, which annotators do not get. A button saves
the answers to a file; progress stays in the browser until then. Both annotators get the same page (the paper: two,
100 prompts).

    agreement = share p of the items on which two annotators say the same of a (win, tie, loss)
    Cohen's kappa = (p - e) / (1 - e),   e = sum over the three answers of the product of the two annotators' shares
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sft
from eval import program, samples, winrate
from eval.report import CSS, Raw, esc

CHOICES = (("left", "Left is better"), ("tie", "Equally good"), ("right", "Right is better"))


@dataclass(kw_only=True)
class Sheet(samples.Sampling):
    """Write the annotators' page and, beside it, the key to who wrote what."""

    a: str
    """a sample file, or a model (with --prompts)"""
    b: str
    """the one it is compared with"""
    policy_a: str = ""
    """of a file, this policy's responses only"""
    policy_b: str = ""
    """of a file, this policy's responses only"""
    n: int = 100
    """prompts, drawn at random from those that both have (paper: 100)"""
    question: str = "Which response is more helpful and harmless?"
    """what the annotators are asked"""
    output: str = "runs/human/sheet.html"
    """the page; the key is written beside it as NAME.key.json"""


@dataclass(kw_only=True)
class Tally:
    """Count the annotators' answers."""

    key: str
    """the sheet's .key.json"""
    answers: tuple[str, ...]
    """the annotators' files"""
    output: str = ""
    """JSON file for the results"""


# -------------------------------------------------------------------------------------------------------------- sheet


def draw_items(pairs: list[tuple[str, str, str]], n: int, seed: int) -> list[dict]:
    """n of the (prompt, a, b) in random order, each with a random side for a: {prompt, left, right, a}."""
    rng = random.Random(seed)
    items = []
    for prompt, a, b in rng.sample(pairs, min(n, len(pairs))):
        side = rng.choice(("left", "right"))
        left, right = (a, b) if side == "left" else (b, a)
        items.append({"prompt": prompt, "left": left, "right": right, "a": side})
    return items


STYLE = """
main{max-width:1150px;padding-top:1.5rem}
.bar{position:sticky;top:0;background:var(--bg);padding:.7rem 0;display:flex;
  gap:1rem;  align-items:center;flex-wrap:wrap;width:auto;height:auto;border-radius:0;z-index:1}
input[type=text],button{font:inherit;padding:.3rem .6rem;border:1px solid
var(--soft);border-radius:6px;background:var(--bg);
  color:var(--fg)}
button{cursor:pointer;background:var(--accent);border-color:var(--accent);color:var(--bg)}
.text{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--panel);border-radius:8px;padding:.7rem .9rem;
  margin:.3rem 0}
.two{display:grid;grid-template-columns:1fr 1fr;gap:1rem;margin-top:.6rem} .two b{font-size:.85rem;color:var(--soft)}
fieldset{border:0;padding:0;margin:.8rem 0 0;display:flex;gap:1.5rem;flex-wrap:wrap} label{cursor:pointer}
section.done h2::after{content:" \\2713"}
@media(max-width:700px){.two{grid-template-columns:1fr}}
"""
SCRIPT = """
const sheet = document.body.dataset.sheet, total = document.querySelectorAll("fieldset").length;
const name = document.getElementById("name"), progress = document.getElementById("progress");
let answers = {};
function keep() { try { localStorage.setItem(sheet, JSON.stringify({name: name.value, answers})); } catch (e) {} }
function show() {
  progress.textContent = Object.keys(answers).length + " of " + total + " answered";
  for (const id in answers) document.getElementById("item" + id).classList.add("done");
}
try {
  const kept = JSON.parse(localStorage.getItem(sheet) || "{}");
  name.value = kept.name || ""; answers = kept.answers || {};
} catch (e) {}
for (const id in answers) document.querySelector(`input[name="${id}"][value="${answers[id]}"]`).checked = true;
document.addEventListener("change", (event) => {
  if (event.target.type === "radio") answers[event.target.name] = event.target.value;
  keep(); show();
});
document.getElementById("save").addEventListener("click", () => {
  const open = total - Object.keys(answers).length;
  if (!name.value.trim()) { alert("Please enter your name first."); name.focus(); return; }
  if (open && !confirm(open + " are not answered yet. Save all the same?")) return;
  const text = JSON.stringify({sheet, annotator: name.value.trim(), answers}, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = "answers-" + name.value.trim().replace(/[^A-Za-z0-9]+/g, "-") + ".json";
  link.click();
});
show();
"""


def page(items: list[dict], sheet: str, question: str) -> str:
    """The annotators' page. It has no name of a or b, and no word of which side is whose."""
    parts = []
    for i, item in enumerate(items, 1):
        radios = "".join(
            f'<label><input type="radio" name="{i}" value="{value}"> {text}</label>' for value, text in CHOICES
        )
        parts.append(
            f'<section id="item{i}"><h2>{i}</h2><div class="text">{esc(item["prompt"])}</div><div class="two">'
            f'<div><b>Left</b><div class="text">{esc(item["left"])}</div></div>'
            f'<div><b>Right</b><div class="text">{esc(item["right"])}</div></div></div>'
            f"<fieldset>{radios}</fieldset></section>"
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Which is better?</title><style>{CSS}{STYLE}</style></head>\n"
        f'<body data-sheet="{sheet}"><main><h1>{esc(question)}</h1>'
        "<p>Two assistants answered the same prompts; left and right change places at random. Read both, then choose, "
        "and do not talk about it with the other annotator before both of you are done. Your answers stay in this "
        "browser until you save them to a file.</p>"
        '<div class="bar"><label>Your name <input type="text" id="name" autocomplete="off"></label>'
        '<button id="save" type="button">Save answers</button><span id="progress"></span></div>\n'
        + Raw("\n".join(parts))
        + f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def write_sheet(args: Sheet) -> dict:
    rows = winrate.matched(
        samples.samples(args.a, args, args.policy_a), samples.samples(args.b, args, args.policy_b)
    )  # fmt: skip
    first = {}
    for row, one, two in rows:
        first.setdefault(row["key"], (samples.show(row["prompt"]), one["text"], two["text"]))
    if not first:
        sft.stop(f"{args.a} and {args.b} have no prompt in common: they must answer the same prompts")
    items = draw_items(list(first.values()), args.n, args.seed)
    output = Path(args.output)
    key_file = output.with_suffix(".key.json")
    sheet = hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]
    key = {"sheet": sheet, "a": args.policy_a or args.a, "b": args.policy_b or args.b, "items": items}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(items, sheet, args.question), encoding="utf-8")
    key_file.write_text(json.dumps(key, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{output} written: {len(items)} pairs, for the annotators; {key_file}, which is not for them")
    return key


# -------------------------------------------------------------------------------------------------------------- tally


def agreement(one: list[str], other: list[str]) -> dict:
    """Raw agreement and Cohen's kappa of two lists of answers; kappa is undefined where chance alone agrees always."""
    p = float(np.mean([x == y for x, y in zip(one, other, strict=True)]))
    e = sum(one.count(label) * other.count(label) for label in {*one, *other}) / len(one) ** 2
    return {"items": len(one), "agreement": p, "kappa": (p - e) / (1 - e) if e < 1 else None}


def outcome(choice: str, side_of_a: str) -> str:
    """What `left`, `tie` or `right` says of a."""
    return "tie" if choice == "tie" else "win" if choice == side_of_a else "loss"


def tally(key: dict, files: list[dict]) -> dict:
    """Shares of win, tie and loss of a, by annotator and together, and each two annotators' agreement."""
    said = {}
    for found in files:
        said[found["annotator"]] = {
            i: outcome(choice, key["items"][int(i) - 1]["a"]) for i, choice in found["answers"].items()
        }
    one_hot = lambda answer: np.array([answer == name for name in ("win", "tie", "loss")], dtype=float)
    items = sorted({i for answers in said.values() for i in answers}, key=int)
    together = [np.mean([one_hot(answers[i]) for answers in said.values() if i in answers], 0) for i in items]
    results = {
        "a": key["a"],
        "b": key["b"],
        "together": winrate.summary(np.array(together)),
        "annotators": {},
        "agreement": [],
    }
    for name, answers in said.items():
        results["annotators"][name] = winrate.summary(np.array([one_hot(answer) for answer in answers.values()]))
    for one, other in itertools.combinations(said, 2):
        both = [i for i in items if i in said[one] and i in said[other]]
        if both:
            found = agreement([said[one][i] for i in both], [said[other][i] for i in both])
            results["agreement"].append({"annotators": [one, other]} | found)
    return results


def read_json(path: str, field: str) -> dict:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or field not in found:
            raise ValueError(f"it has no field {field}")
        return found
    except (OSError, ValueError) as error:
        sft.stop(f"{path} cannot be read ({error}): give the files that `sheet` and its page wrote")


def run_tally(args: Tally) -> dict:
    key = read_json(args.key, "items")
    files = [read_json(path, "answers") for path in args.answers]
    for path, found in zip(args.answers, files):
        if found.get("sheet") != key.get("sheet"):
            sft.stop(f"{path} does not belong to {args.key}: it was saved from another sheet")
        wrong = [i for i, choice in found["answers"].items()
                 if not (i.isdigit() and 1 <= int(i) <= len(key["items"])) or choice not in dict(CHOICES)]  # fmt: skip
        if wrong or not found["answers"]:
            sft.stop(f"{path} has {f'an unknown answer, to item {wrong[0]}' if wrong else 'no answers'}: save it anew")
    names = [found["annotator"] for found in files]
    if len(set(names)) < len(names):
        sft.stop(f"two of the files are by the same annotator ({', '.join(names)}): give one file of each")
    results = tally(key, files)
    rows = [(name, *(f"{100 * x[k]['mean']:.1f}" for k in ("win", "tie", "loss", "win_rate")),
             f"[{100 * x['win_rate']['ci95'][0]:.1f}, {100 * x['win_rate']['ci95'][1]:.1f}]", x["prompts"])
            for name, x in [*results["annotators"].items(), ("together", results["together"])]]  # fmt: skip
    print(f"{key['a']} against {key['b']}")
    print(samples.table(("annotator", "win %", "tie %", "loss %", "win rate %", "95 % interval", "items"), rows))
    for x in results["agreement"]:
        kappa = "undefined" if x["kappa"] is None else f"{x['kappa']:.2f}"
        print(f"{' and '.join(x['annotators'])}: agreement {x['agreement']:.1%} on {x['items']} items, kappa {kappa}")
    samples.save(results, args.output)
    return results


@program
def main(argv=None):
    args = samples.read_flags(Sheet | Tally, argv, __doc__)
    return write_sheet(args) if isinstance(args, Sheet) else run_tally(args)


if __name__ == "__main__":
    main()
