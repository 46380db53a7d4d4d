# Every target makes .venv from requirements.txt when it is not there.
PY = .venv/bin/python
DEMO ?= runs/demo
SEED ?= 0

demo: .venv/done  ## sft -> gvm -> dvpo (the paper's advantage and the best one) -> report, on a laptop
	rm -rf $(DEMO)
	$(PY) sft.py --seed $(SEED) --output_dir $(DEMO)/sft
	$(PY) gvm.py --seed $(SEED) --output_dir $(DEMO)/gvm --model $(DEMO)/sft/final
	$(PY) dvpo.py --seed $(SEED) --output_dir $(DEMO)/dvpo --policy $(DEMO)/sft/final --gvm $(DEMO)/gvm/final
	$(PY) dvpo.py --seed $(SEED) --output_dir $(DEMO)/dvpo_q --policy $(DEMO)/sft/final --gvm $(DEMO)/gvm/final \
		--advantage q
	$(PY) eval/demo.py $(DEMO)
	$(PY) eval/report.py $(DEMO)

demo-all: demo  ## and the reward model, a GVM without tau, and the third advantage
	$(PY) rm.py --seed $(SEED) --output_dir $(DEMO)/rm --model $(DEMO)/sft/final
	$(PY) gvm.py --seed $(SEED) --output_dir $(DEMO)/gvm_no_tau --model $(DEMO)/sft/final --tau_pairs 0
	$(PY) dvpo.py --seed $(SEED) --output_dir $(DEMO)/dvpo_q_minus_v --policy $(DEMO)/sft/final --gvm $(DEMO)/gvm/final \
		--advantage q_minus_v
	$(PY) eval/demo.py $(DEMO)
	$(PY) eval/report.py $(DEMO)

test: .venv/done
	$(PY) -m pytest

lint: .venv/done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: .venv/done
	$(PY) bench/kernels.py

.venv/done: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install -q --upgrade pip
	.venv/bin/pip install -q torch==2.13.0
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.PHONY: demo demo-all test lint bench
