"""dvpo.py with one thing replaced, for questions of EXPERIMENTS.md that no flag of a script asks.

    python experiments/variants.py exact_q --gvm runs/gvm/final ...           # and dvpo.py's flags

exact_q     the values are the toy world's own: those of the crowd, which is what SFT imitates, in the GVM's units
other_tau   tau are texts of the grouch on the same prompts: another policy than the one that is optimised
released    the form of the authors' released code: no tau, V(s_t) at the token before, and no terminal value in GAE
"""

import random
import sys
from pathlib import Path

import torch
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dvpo
import toy


def exact_q(argv):
    """Values of the crowd in place of the GVM's, standardised as its are."""
    config = AutoConfig.from_pretrained(argv[argv.index("--gvm") + 1])
    original = dvpo.score_rollout

    def scored(engine, frozen, rows, tokenizer, *rest):
        old_logp, ref_logp, values = original(engine, frozen, rows, tokenizer, *rest)
        for i, (_, response, turns) in enumerate(rows):
            prompt = tokenizer.decode(turns[-1][0]).split("<user> ")[-1].split(" <assistant>")[0]
            exact = toy.exact_values("crowd", prompt, tokenizer.convert_ids_to_tokens(response))
            exact = torch.tensor(exact, dtype=values.dtype)
            values[i, : len(exact)] = (exact - config.reward_mean) / config.reward_std
        return old_logp, ref_logp, values

    dvpo.score_rollout = scored


def other_tau(argv):
    original = dvpo.render

    def render(tokenizer, group, tau_tokens):
        shown = []
        for answer in group[:-1]:
            prompt = answer.prompt[-1]["content"]
            text = toy.write("grouch", prompt, random.Random(f"{prompt} {answer.response}"))
            ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            shown.append(dvpo.Answer(answer.prompt, ids))
        return original(tokenizer, [*shown, group[-1]], tau_tokens)

    dvpo.render = render


def released(argv):
    argv += ["--tau_pairs", "0"]

    def advantages(values, kl, mask, *, discount=1.0, lam=0.95, kl_coef=0.0, **_):
        """delta_t = discount V(s_{t+1}) - V(s_t) - beta kl_t, V(s_t) read before y_t, and 0 after the last token."""
        v = values[:, :-1] * mask
        following = torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], 1)
        delta = (discount * following - v - kl_coef * kl) * mask
        return dvpo.normalize_values(dvpo.discounted_sum(delta, discount * lam), mask)

    dvpo.advantages = advantages


VARIANTS = {"exact_q": exact_q, "other_tau": other_tau, "released": released}

if __name__ == "__main__":
    name, argv = sys.argv[1], sys.argv[2:]
    VARIANTS[name](argv)
    dvpo.main(argv)
