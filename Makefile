# make demo: train on embedded data.  make test: everything the project promises.  Both set up .venv by themselves.
# make gpu-suite DATA=images BUDGET=30: everything that needs a GPU, in that many minutes; repeat it to continue.
# make gpu-pack IMAGES=archive: gpu-suite.tar.gz for a machine without network, where make gpu-suite then needs no .venv.
.PHONY: demo test gpu-suite gpu-pack setup setup-test lint clean

BUDGET ?= 30
OUT ?= runs/gpu-suite
PACKED := $(wildcard ../wheels)

demo: setup
	.venv/bin/fastssl train recipes/quickstart.yaml --run-dir "runs/quickstart-$$(date +%Y%m%d-%H%M%S)"

test: setup-test
	.venv/bin/python -m pytest -n 6 --dist worksteal

gpu-suite: $(if $(PACKED),,setup-test)
	$(if $(PACKED),eval "$$(python3 tools/install_gpu_suite.py)" && python3,.venv/bin/python) bench/gpu_suite.py \
	  --budget-min $(BUDGET) --out "$(OUT)" $(if $(DATA),--data "$(DATA)") $(if $(RESULTS),--results "$(RESULTS)") $(FLAGS)

gpu-pack: setup-test
	.venv/bin/python tools/pack_gpu_suite.py $(if $(IMAGES),--images "$(IMAGES)")

lint: setup-test
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy && .venv/bin/lint-imports

setup:
	@bash tools/setup.sh base

setup-test:
	@bash tools/setup.sh test

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
