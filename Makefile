# make train: from a clean clone to a trained model.   make test: every notebook and every test.
VENV    := .venv
BIN     := $(VENV)/bin
PYTHON  ?= python3
WORKERS ?= 2
DATA    ?= ../shared/data/dsb2018_stage1_train.zip
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv train nuclei test bench bench-train mosaic gpu gpu-model lab site readme clean

help:
	@echo 'make venv     the environment in $(VENV) (about 6 GB, a few minutes)'
	@echo 'make train    train on the shapes, results in runs/shapes'
	@echo 'make nuclei   train on real nuclei, DATA=folder or zip, results in runs/nuclei'
	@echo 'make test     run every notebook, then pytest'
	@echo 'make bench    our ops beside torchvision'\''s on this CPU, into benchmarks/results/ops.json'
	@echo 'make bench-train  the whole model beside torchvision'\''s on this CPU, into benchmarks/results/model.json (40 minutes)'
	@echo 'make mosaic   8,192 x 8,192 pixels of nuclei in tiles: memory, counts, seams, into benchmarks/results/mosaic.json; DATA=folder or zip'
	@echo 'make gpu      all checks and measurements that need a GPU, into benchmarks/results/; PYTHON has torch and torchvision'
	@echo 'make gpu-model  the whole model on a GPU: ratios, graphs, time to mask AP 0.93; without one as far as it goes'
	@echo 'make lab      open the notebooks'
	@echo 'make site     static pages of all lessons, modules and tests, into build/site; offline'
	@echo 'make readme   write README.md from nbs/index.ipynb'
	@echo 'make clean    remove caches and build leftovers'

venv: $(VENV)/.installed

$(VENV)/.installed: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

train: venv
	$(BIN)/maskrcnn-edu train shapes --out runs/shapes

nuclei: venv
	$(BIN)/maskrcnn-edu train nuclei --data $(DATA) --out runs/nuclei

# one thread a worker, so that the workers do not fight for the cores
test: export OMP_NUM_THREADS := 1
test: export MKL_NUM_THREADS := 1
test: export MASKRCNN_EDU_STATIC := 1
test: venv
	$(BIN)/nbdev-test --n-workers $(WORKERS) --timing
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup tests

bench: venv
	$(BIN)/python benchmarks/ops.py

bench-train: venv
	$(BIN)/python benchmarks/model.py --scaling --ap --options

mosaic: venv
	$(BIN)/python benchmarks/mosaic.py --data $(DATA)

# on a machine that has torch and torchvision already: no environment of its own is made
gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py

gpu-model:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_model.py

lab: venv
	$(BIN)/nbdev-trust
	$(BIN)/jupyter lab nbs/index.ipynb

site: venv
	$(BIN)/python site/build.py build/site

readme: venv
	$(BIN)/python tools/readme.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -print0 | xargs -0 rm -rf
