"""Six wake words, 3 s each, ten labels per class.

    python finetune.py config/finetune_wakewords.py --ckpt=out/real/ckpt.pt

What it costs: 200 updates of 16 clips. Time with the model of config/real.py: two minutes on one CPU core. What to
expect: 84 %; 87 % with --max_steps=600, from scratch 86 with --lr=2e-3 too (docs/results.md).
"""
include('finetune_small.py')

out_dir = 'out/finetune_wakewords'
dataset = 'wakewords'
labels_per_class = 10
frames = 304                    # 3 s
max_steps = 200
batch_size = 16
roll = False
noise = True
