# Every target makes .venv when it is not there: from requirements.txt for a demo, from requirements-dev.txt for all else.
PY = .venv/bin/python
DEMO ?= runs/demo
SEED ?= 0
RUN = --seed $(SEED) --output_dir $(DEMO)
SFT = $(DEMO)/sft/final
SAMPLED = --policy $(SFT) --data $(DEMO)/sample/graded.jsonl

demo:  ## sft -> gvm -> dvpo, and sft -> rm -> samples -> vcb -> report, on a laptop; an earlier demo is moved aside
	if [ -e $(DEMO) ]; then mv $(DEMO) $(DEMO).$$(date +%Y%m%d-%H%M%S); fi
	$(MAKE) $(DEMO)/report.html

$(DEMO)/report.html: | .venv/done
	$(PY) sft.py $(RUN)/sft
	$(PY) gvm.py $(RUN)/gvm --model $(SFT)
	$(PY) dvpo.py $(RUN)/dvpo --policy $(SFT) --gvm $(DEMO)/gvm/final --snapshot_every 20
	$(PY) rm.py $(RUN)/rm --model $(SFT)
	$(PY) sample.py $(RUN)/sample --policy $(SFT) --reward_model $(DEMO)/rm/final --data toy,toy,toy --n 16
	$(PY) vcb.py $(RUN)/vcb $(SAMPLED) --snapshot_every 24
	$(PY) eval/demo.py $(DEMO)
	$(PY) eval/report.py $(DEMO)

demo-all: $(DEMO)/report.html  ## to the demo (made if it is not there) adds DVPO's other advantages, a GVM without tau and the main baselines
	$(PY) dvpo.py $(RUN)/dvpo_q --policy $(SFT) --gvm $(DEMO)/gvm/final --snapshot_every 20 --advantage q
	$(PY) dvpo.py $(RUN)/dvpo_q_minus_v --policy $(SFT) --gvm $(DEMO)/gvm/final --snapshot_every 20 --lam 0
	$(PY) gvm.py $(RUN)/gvm_no_tau --model $(SFT) --tau_pairs 0
	$(PY) dpo.py $(RUN)/dpo $(SAMPLED) --snapshot_every 24 --loss dpo
	$(PY) dpo.py $(RUN)/ipo $(SAMPLED) --snapshot_every 24 --loss ipo
	$(PY) dpo.py $(RUN)/slic $(SAMPLED) --snapshot_every 24 --loss slic --nll_coef 3 --learning_rate 3e-4
	$(PY) dpo.py $(RUN)/rrhf $(SAMPLED) --snapshot_every 24 --loss rrhf --nll_coef 10 --learning_rate 3e-4
	$(PY) rest.py $(RUN)/rest $(SAMPLED) --snapshot_every 72
	$(PY) ppo.py $(RUN)/ppo --policy $(SFT) --reward_model $(DEMO)/rm/final --snapshot_every 20
	for b in remax rloo grpo reinforce++; do $(PY) reinforce.py --baseline $$b $(RUN)/$$b --policy $(SFT) \
		--reward_model $(DEMO)/rm/final --snapshot_every 20 || exit; done
	$(PY) eval/demo.py $(DEMO)
	$(PY) eval/report.py $(DEMO)

test: .venv/dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

test-all: .venv/dev  ## and every family, precision and ZeRO stage through every script
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "slow or not slow"

chaos: .venv/dev  ## kills at every file-system call of every script, strangers' rows, a long run: minutes
	$(PY) tests/chaos.py

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

experiments: .venv/dev  ## all runs of EXPERIMENTS.md's toy world, its tables and pictures: says first how long; goes on where it stopped
	$(PY) experiments/run.py
	$(PY) experiments/pictures.py
	$(PY) experiments/page.py

bench: .venv/dev
	$(PY) bench/kernels.py

.venv/done: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install -q --upgrade pip
	.venv/bin/pip install -q torch==2.13.0
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/done
	.venv/bin/pip install -q -r requirements-dev.txt
	touch $@

.PHONY: demo demo-all test test-all lint bench experiments chaos
