# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
PY = .venv/bin/python
# Two processes of one thread each: on two cores faster than one process of two threads. What they
# free they keep: asking the system for memory again takes a fifth of the time that fills the cache.
TWO_RANKS = OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000 \
  $(PY) -m torch.distributed.run --standalone --nproc_per_node 2
DEMO = runs/demo

.PHONY: demo test docs docs-test test-units test-runs reference soak miniature

demo: .venv/ready   ## the main job in small: render, train both stages, evaluate, predict
	$(PY) evaluate.py --ckpt weights/miniature_sd2.safetensors --datasets miniature --out $(DEMO)/scores_untrained
	rm -rf $(DEMO)/stage1 $(DEMO)/stage2
	$(TWO_RANKS) train_stage1.py --out $(DEMO)/stage1
	$(PY) evaluate.py --ckpt $(DEMO)/stage1/model.safetensors --datasets miniature --out $(DEMO)/scores_stage1
	$(TWO_RANKS) train_stage2.py --ckpt $(DEMO)/stage1/model.safetensors --out $(DEMO)/stage2
	$(PY) evaluate.py --ckpt $(DEMO)/stage2/model.safetensors --datasets miniature --out $(DEMO)/scores_stage2
	$(PY) predict.py --ckpt $(DEMO)/stage2/model.safetensors --out $(DEMO)/predictions
	$(PY) -m miniature.demo_table $(DEMO)

# Much of the time of runs that are killed is waiting, so the other tests run beside them. (Some
# more go with them, which evens out the two halves.)
RUNS = tests/faults tests/test_trainers.py tests/test_train_stage2.py tests/test_systems.py tests/test_speed.py
test: .venv/extras
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j 2 test-units test-runs

test-units:
	$(PY) -m pytest -q tests --ignore tests/reference $(addprefix --ignore ,$(RUNS))

test-runs:
	$(PY) -m pytest -q $(RUNS)

docs: .venv/ready   ## draws the pictures of the README
	$(PY) -m docs.pictures

docs-test: .venv/extras   ## runs every command of docs/*.md in miniature
	$(PY) -m docs.check

reference: .venv-reference/ready   ## compares the networks with diffusers and transformers
	.venv-reference/bin/python -m pytest -q tests/reference

soak: .venv/ready   ## kills, full disks and damaged checkpoints for half an hour; prints a table
	$(PY) -m tests.faults.harness

# Makes the models in weights/ again: about five hours on 2 cores.
SCENES = runs/scenes
miniature: .venv/ready
	$(PY) -m miniature.render $(SCENES) --train 1800 --val 96 --streets-train 300
	$(PY) -m miniature.pretrain vae --scenes $(SCENES)
	$(PY) -m miniature.render $(SCENES) --train 5000 --val 96 --streets-train 600
	$(PY) -m miniature.pretrain denoiser teacher --scenes $(SCENES)
	$(PY) -m miniature.render $(SCENES) --train 18000 --val 96 --streets-train 900
	$(TWO_RANKS) train_stage1.py --sd2 weights/miniature_sd2.safetensors \
	  --teacher weights/miniature_dinov2.safetensors --data $(SCENES)/hypersim \
	  --vkitti $(SCENES)/vkitti --vkitti-crop 96 336 --cache runs/cache \
	  --batch 16 --micro-batch 8 --lr 1e-3 --steps 11000 --decay-steps 11000 \
	  --validate-every 2000 --validate-images 48 --out runs/miniature/stage1
	$(PY) -m miniature.pretrain publish --ckpt runs/miniature/stage1/model.safetensors

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/extras: .venv/ready extras/requirements.txt
	.venv/bin/pip install -q -r extras/requirements.txt
	touch $@

.venv-reference/ready: tests/requirements-reference.txt
	$(PYTHON) -m venv .venv-reference
	.venv-reference/bin/pip install -q -r tests/requirements-reference.txt
	touch $@
