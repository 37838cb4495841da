# make run      the main job: train a small DeepSeek-V2, judge it, generate, draw (about 4 minutes)
# make test     lint, unit tests, notebooks
# make lab      JupyterLab on the notebooks
# Everything is installed into .venv on first use.

PYTHON ?= python3
BIN := .venv/bin
EXTRAS := notebooks,test
export MPLBACKEND := Agg

run: ready
	$(BIN)/python -m dsv2_ref run > /dev/null

lab: ready
	MPLBACKEND= $(BIN)/python -m jupyter lab notebooks

test: lint unit notebooks

lint: ready
	$(BIN)/ruff check .

unit: ready
	$(BIN)/python -m pytest -q -n 2 --dist loadscope

notebooks: ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --nbval --nbval-cell-timeout 120 \
		-n 2 --dist loadscope notebooks

# a copy of all notebooks without their answers, in a new or empty folder: make student DIR=...
student: ready
	@$(BIN)/python -m dsv2_ref.exercises.student "$(DIR)"

# slower: unit tests and notebooks as other CPUs would run them, and on two threads (an hour)
matrix: ready
	@$(BIN)/python tests/matrix.py

# slower: every notebook in JupyterLab in a real browser; needs Chromium (Debian: chromium)
browser: EXTRAS := $(EXTRAS),browser
browser: ready
	$(BIN)/python -m pytest -q tests/browser_jupyterlab.py

# slower: a training run that is killed 200 times (`make test` has 5)
kill: ready
	DSV2_KILLS=200 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_run_folder.py -k kills

# slower: eight processes, and `train` under torchrun, killed, restarted, resumed by others
parallel: ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/parallel_slow.py

# slower: two nodes as dsv2_ref/parallel/several_nodes.md says; needs root and `ip netns` (Linux)
nodes: ready
	$(BIN)/python -m pytest -q tests/nodes.py

# base, SFT, reward model, GRPO in two stages, and a table of them (15 minutes at most)
align: ready
	$(BIN)/python -m dsv2_ref align > /dev/null

# the loss of GRPO beside trl's own
parity: EXTRAS := $(EXTRAS),parity
parity: ready
	$(BIN)/python -m pytest -q tests/parity_trl.py

# slower: lm-eval, vLLM and llama.cpp read our folders; tests/clients.py says what it needs
clients: EXTRAS := $(EXTRAS),clients
clients: ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/clients.py

# slower: the adapter for lm-eval beside lm-eval's own for transformers (some minutes)
parity_lm_eval: EXTRAS := $(EXTRAS),eval
parity_lm_eval: ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/parity_lm_eval.py

# the package at full size on a card that is not there, and faults put back (some minutes; no GPU)
rehearse: ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/rehearse.py

# every test of every lifted kernel, where `make test` runs the first
copies: ready
	DSV2_ALL_COPIES=1 $(BIN)/python -m pytest -q -n 2 tests/test_copying.py

# slower: the speed against transformers, on a quiet machine
bench: ready
	$(BIN)/python -m dsv2_ref bench cpu_decode
	$(BIN)/python -m dsv2_ref bench train
	OMP_NUM_THREADS=1 $(BIN)/python -m dsv2_ref bench serve

# the course as static pages under build/site; `make site EXTERNAL=--external` asks for other sites' pages too
site: EXTRAS := $(EXTRAS),site
site: ready
	@$(BIN)/python .ci/course_site.py $(EXTERNAL)

# README's table of the files, from the one in dsv2_ref/__init__.py
map: ready
	$(BIN)/python tests/readme_map.py

# notebooks/GLOSSARY.md: the symbols, their sizes, where each is introduced and made
glossary: ready
	$(BIN)/python tests/glossary.py

# compile every kernel for three kinds of cards and judge the machine code; no GPU needed
audit: ready
	$(BIN)/python -m pytest -q -m audit tests/test_kernels_compile.py

# break every kernel on purpose; the test named for each mistake must fail
mutants: ready
	$(BIN)/python -m pytest -q -n 2 -m mutants tests/test_kernel_mutants.py tests/test_mutants.py

# run every notebook afresh and store its outputs
execute: ready
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False notebooks/*.ipynb

# the small trained model under data/model (half an hour on one core); data/README.md has the result
model: ready
	OMP_NUM_THREADS=1 $(BIN)/python -m dsv2_ref train --preset mini --corpus stories --steps 4000 \
		--batch 8 --precision fp32 --out build/mini
	rm -rf data/model && cp -r build/mini/model data/model

# .venv, made where it is not there and mended where it is not what it should be
ready:
	@$(PYTHON) .ci/environment.py $(EXTRAS) $(if $(filter file,$(origin PYTHON)),,--asked)

clean:
	rm -rf build .venv

.PHONY: matrix ready run lab test lint unit notebooks student browser \
	kill parallel nodes align parity parity_lm_eval clients copies rehearse bench audit mutants site map \
	glossary execute model clean
