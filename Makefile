# Every target makes .venv from requirements.txt when it is not there.
PY = .venv/bin/python
DEMO = runs/demo

.venv/done: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install -q --upgrade pip
	.venv/bin/pip install -q torch==2.13.0
	.venv/bin/pip install -q -r requirements.txt
	touch $@

test: .venv/done
	$(PY) -m pytest

lint: .venv/done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.PHONY: test lint demo demo-all bench
