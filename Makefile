# make demo: train on embedded data.  make test: everything the project promises.  Both set up .venv by themselves.
.PHONY: demo test setup setup-test lint clean

demo: setup
	.venv/bin/fastssl train recipes/quickstart.yaml --run-dir "runs/quickstart-$$(date +%Y%m%d-%H%M%S)"

test: setup-test
	.venv/bin/python -m pytest -n 2

lint: setup-test
	.venv/bin/ruff check . && .venv/bin/mypy && .venv/bin/lint-imports

setup:
	@bash tools/setup.sh base

setup-test:
	@bash tools/setup.sh test

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
