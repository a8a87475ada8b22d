# make demo: train on embedded data.  make test: everything the project promises.  Both set up .venv by themselves.
# make gpu-suite DATA=images BUDGET=180: everything that needs a GPU, in minutes; repeat it to go on.
.PHONY: demo test gpu-suite setup setup-test lint clean

DATA ?= cifar10
BUDGET ?= 180
OUT ?= runs/gpu-suite

demo: setup
	.venv/bin/fastssl train recipes/quickstart.yaml --run-dir "runs/quickstart-$$(date +%Y%m%d-%H%M%S)"

test: setup-test
	.venv/bin/python -m pytest -n 2

gpu-suite: setup-test
	.venv/bin/python bench/gpu_suite.py --data "$(DATA)" --budget-min $(BUDGET) --out "$(OUT)"

lint: setup-test
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy && .venv/bin/lint-imports

setup:
	@bash tools/setup.sh base

setup-test:
	@bash tools/setup.sh test

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
