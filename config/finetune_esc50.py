"""ESC-50, five folds, with the values of the authors' script.

    python prepare.py esc50
    python finetune.py config/finetune_esc50.py --ckpt=CHECKPOINT --fold=all

What it costs: 4,000 updates of 48 five-second clips per fold, base model. Time: not measured by us on a GPU. What to
expect: the paper reports 96.1 % from AudioSet-2M pre-training; we have no such checkpoint and did not run it.
"""
out_dir = 'out/finetune_esc50'
dataset = 'esc50'
fold = 'all'
frames = 512
max_steps = 4000
warmup_steps = 400
batch_size = 48
lr = 5e-5
input_mask = 0.4
label_smoothing = 0.1
roll = True
