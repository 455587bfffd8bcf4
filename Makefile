# Every target prepares what it needs in $(VENV), with the versions of constraints.txt; nothing has to be run before it.
#   make demo PYTHON=python3.12          another Python than 3.11 (3.10 to 3.13)
#   make test PYTEST_ARGS="-k geometry"  options for pytest
PYTHON      ?= python3.11
VENV        ?= .venv
PYTEST_ARGS ?=
# Three at a time on two cores: the farm's tests mostly wait, for boards to start or a tracker to come back.
TEST_JOBS   ?= 3

# What the demo runs on is installed first and alone: it is the smaller part, and a first look should be quick.
RUN_EXTRAS := train,weights,plot,tune-cpu
DEV_EXTRAS := $(RUN_EXTRAS),cross,cuda,sign,models,test,baselines,docs,dev
RUN_STAMP  := $(VENV)/.installed-run
DEV_STAMP  := $(VENV)/.installed-dev
BIN        := $(VENV)/bin
# Compiling every module of torch and TVM to bytecode takes a minute, and few of them are imported: leave that to the
# first import, which is made here because an environment with PYTHONDONTWRITEBYTECODE would never keep its bytecode.
INSTALL    := $(BIN)/python -m pip install --no-compile --disable-pip-version-check -c constraints.txt
WARM_UP    := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c

.DELETE_ON_ERROR:
.PHONY: help demo report test lint format typecheck docs linkcheck wheel clean

help:
	@echo "make demo       tune, build, train and compare on this machine; ends with a table and a picture"
	@echo "make report     evaluates two networks and makes docs/report; half an hour"
	@echo "make test       the tests"
	@echo "make lint       ruff: rules and formatting"
	@echo "make format     ruff: formats and repairs what it can"
	@echo "make typecheck  mypy"
	@echo "make docs       the documentation, in build/docs/html"
	@echo "make linkcheck  whether the documentation's links to other sites work; needs a network"
	@echo "make wheel      dist/gf_tvm-*.whl"
	@echo "make clean      removes what was built, but not $(VENV)"

$(RUN_STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; try: make $(MAKECMDGOALS) PYTHON=python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[$(RUN_EXTRAS)]'
	$(WARM_UP) 'import torch, tvm.s_tir.meta_schedule, xgboost, sklearn.datasets, matplotlib.pyplot'
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	$(INSTALL) -e '.[$(DEV_EXTRAS)]'
	$(WARM_UP) 'import hypothesis, pytest, torch._dynamo, transformers'
	@touch $@

demo: $(RUN_STAMP)
	$(BIN)/python -m gf_tvm.runners.demo --out build/demo

# docs/report: two networks with their compiled kernels, evaluated over five and three seeds, beside the convolutions
# measured by benchmarks/cpu.py. For an idle machine, if the times are to count. What is finished is not repeated.
REPORT  := build/report
DIGITS  := --model resnet18_025 --data digits --patch exact,2,4,7 --last 1,2,4 --seeds 0,1,2,3,4 --shift 0 \
           --pretrain-epochs 12 --epochs 10 --layer-by-layer
SCENES  := --model fcn_resnet18_025 --data scenes --patch exact,2,4 --last 2 --seeds 0,1,2 --shift 0 --batch 16 \
           --pretrain-epochs 8 --pretrain-lr 0.2 --epochs 10 --lr 0.02 --layer-by-layer
report: $(RUN_STAMP)
	@mkdir -p $(REPORT)
	$(BIN)/gf-tvm build --model resnet18_025 --input 32x3x32x32 --last 4 --patch 2,4,7 --out $(REPORT)/digits.gfb
	$(BIN)/gf-tvm evaluate $(DIGITS) --library $(REPORT)/digits.gfb --max-accuracy-drop 1 --out $(REPORT)/digits \
	    --json docs/report/digits.json
	$(BIN)/gf-tvm build --model fcn_resnet18_025 --input 16x3x32x32 --last 2 --patch 2,4 --out $(REPORT)/scenes.gfb
	$(BIN)/gf-tvm evaluate $(SCENES) --library $(REPORT)/scenes.gfb --max-accuracy-drop 2 --out $(REPORT)/scenes \
	    --json docs/report/scenes.json
	$(BIN)/gf-tvm report benchmarks/results/cpu.json docs/report/digits.json docs/report/scenes.json \
	    tuning_logs/x86-64-v4/backward_n32_ci64_co64_56x56_*.jsonl --title "gf_tvm on 2-core virtual machines" --out docs/report

test: $(DEV_STAMP)
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy does not see that schedules/ is gf_tvm.schedules, and so on: show it the packages as they are installed.
typecheck: $(DEV_STAMP)
	@rm -rf build/types && mkdir -p build/types/gf_tvm
	@ln -s "$(CURDIR)"/gf_tvm/* "$(CURDIR)/schedules" "$(CURDIR)/runners" "$(CURDIR)/tuning_logs" build/types/gf_tvm/
	@ln -s "$(CURDIR)/gf_cuda" build/types/
	cd build/types && "$(abspath $(BIN))/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.mypy_cache" -p gf_tvm -p gf_cuda

# All pages every time: Sphinx says nothing about pages that it does not read again. Its script rather than python -m,
# which would find gf_tvm in the current folder, without what lies beside it there.
SPHINX := $(BIN)/sphinx-build -n -W --keep-going -q -E -d build/docs/doctrees -c docs
docs: $(DEV_STAMP)
	@rm -rf build/docs
	$(SPHINX) . build/docs/html
	@echo build/docs/html/index.html

linkcheck: $(DEV_STAMP)
	$(SPHINX) -b linkcheck . build/docs/links

# setuptools never empties build/lib, and would pack modules that are long gone.
wheel: $(RUN_STAMP)
	@rm -rf build/lib build/bdist.*
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find gf_cuda gf_tvm schedules runners tuning_logs tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
