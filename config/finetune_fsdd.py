"""Spoken digits (FSDD), ten classes, 0.4 s each: few labels, or an unheard speaker.

    python finetune.py config/finetune_fsdd.py --ckpt=out/real/ckpt.pt --labels_per_class=10
    python finetune.py config/finetune_fsdd.py --ckpt=out/real/ckpt.pt --fold=theo --max_steps=600

What it costs: 300 updates of 32 clips. Time with the model of config/real.py: a minute on one CPU core. What to expect:
with --lr=2e-3 and --max_steps=900 84 % with ten labels a class (from scratch 81), 81 % on an unheard speaker (81);
docs/results.md.
"""
include('finetune_small.py')

out_dir = 'out/finetune_fsdd'
dataset = 'fsdd'
frames = 64                     # 0.64 s; nine of ten digits are shorter
max_steps = 300
batch_size = 32
warmup_steps = 30
roll = False                    # a digit that starts in its middle is another word
noise = True
