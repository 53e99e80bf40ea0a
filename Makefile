# make train and make test are all that a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test check ablation trials scoreboard bench before quality-race figures notebooks maps demo demo-test published attempts stress environments clean

train: .venv/installed  ## train lesson 5 with the preset that fits the hardware
	$(BIN)/python lesson_05/train_mnist.py

test: .venv/tested  ## run the tests, one process a core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

check: .venv/tested  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

ablation: .venv/installed  ## train and measure every row of lesson 9's ablation
	$(BIN)/python lesson_09/ablation.py

scoreboard: .venv/benchmarks  ## measure every row of the README's table again (needs MNIST)
	$(BIN)/python -m benchmarks.quality.scoreboard

bench: .venv/benchmarks  ## speed and memory, compared with other libraries
	$(BIN)/python -m benchmarks.speed.bench

COMMIT ?= HEAD
before: .venv/installed  ## lesson 5's steps, before and after: make before COMMIT=94eae1f
	$(BIN)/python -m benchmarks.speed.before --commit $(COMMIT)

trials: .venv/benchmarks  ## lesson 2's network, one thing changed in each short trial (needs MNIST)
	$(BIN)/python -m benchmarks.quality.lesson_02_trials

quality-race: .venv/benchmarks  ## three libraries, the same data, 15 minutes each
	$(BIN)/python -m benchmarks.speed.race

figures: .venv/installed  ## make the READMEs' pictures from the shipped networks (needs MNIST)
	$(BIN)/python -m benchmarks.quality.figures

notebooks: .venv/tested  ## run every notebook and keep its pictures
	$(BIN)/jupyter execute --inplace lesson_*/walkthrough.ipynb

maps: .venv/tested  ## correct the line numbers in the READMEs' equation maps and in the page
	$(BIN)/python lesson_06/demo/build.py
	$(BIN)/python -m tests.maps --fix

published: .venv/tested  ## imported networks, those of 114 to 121 million weights, too: 2 GB
	DIFFUSION_LARGE=1 $(BIN)/python -m pytest tests/published

demo: .venv/installed  ## build the page that denoises digits in the browser, one file
	$(BIN)/python lesson_06/demo/build.py

demo-test: .venv/tested  ## compare the page with PyTorch (needs node), and test it in a browser
	$(BIN)/python -m tests.demo.check

attempts: .venv/tested  ## every bad value for every numeric flag, every wrong kind in a checkpoint
	$(BIN)/python tests/attempts.py flags
	$(BIN)/python tests/attempts.py fields

stress: .venv/tested  ## kills, full disks, damaged files, long runs: hours, on an idle machine
	$(BIN)/python tests/stress.py kills --count 200
	$(BIN)/python tests/stress.py files --count 10000
	$(BIN)/python tests/stress.py disk --count 10  # makes small disks: needs root
	$(BIN)/python tests/stress.py processes --count 4
	$(BIN)/python tests/stress.py soak --minutes 30

# OLDEST and NEWEST are the Pythons to try; the packages are the oldest allowed, and the newest.
OLDEST ?= python3.11
NEWEST ?= python3.13
environments:  ## run the tests with the oldest and with the newest Python, PyTorch and the rest
	$(OLDEST) -m venv .venv-oldest
	sed -n 's/^\([a-z][^>]*\)>=/\1==/p' requirements.txt > .venv-oldest/requirements.txt
	.venv-oldest/bin/python -m pip install -r .venv-oldest/requirements.txt -e '.[test]'
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n auto --maxprocesses 8
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --upgrade -r requirements.txt -e '.[test]'
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n auto --maxprocesses 8

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install -r requirements.txt -e '.[test]'
	touch $@

.venv/benchmarks: .venv/installed benchmarks/requirements.txt
	$(BIN)/python -m pip install -r benchmarks/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest
