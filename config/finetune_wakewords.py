"""Six wake words, 3 s each, ten labels per class.

    python finetune.py config/finetune_wakewords.py --ckpt=out/real/ckpt.pt

What it costs: 200 updates of 16 clips. Time with the model of config/real.py: about a minute on one CPU core. What
to expect: not measured with the present checkpoint; docs/results.md has linear probes.
"""
include('finetune_small.py')

out_dir = 'out/finetune_wakewords'
dataset = 'wakewords'
labels_per_class = 10
frames = 304                    # 3 s
max_steps = 200
batch_size = 16
lr = 5e-4
roll = False
noise = True
