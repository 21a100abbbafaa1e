"""The demo's ten synthetic sounds with ten labels per class.

    python finetune.py config/finetune_demo.py --ckpt=out/demo/ckpt.pt

What it costs: 200 updates of 32 clips. Time: 16 seconds on two CPU cores. What to expect: 40 % (317 of 800, one
run) with the demo's own checkpoint; with that of config/real.py, --lr=2e-3 and --max_steps=600 66 %, from scratch 61
(docs/results.md).
"""
include('finetune_small.py')

out_dir = 'out/finetune_demo'
dataset = 'demo'
labels_per_class = 10
max_steps = 200
batch_size = 32
roll = True
noise = True
