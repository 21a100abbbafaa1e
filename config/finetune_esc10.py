"""ESC-10, ten environmental sounds, 5 s each, one fold.

    python prepare.py esc50 --source=ESC-10.tar --out_dir=data/esc10
    python finetune.py config/finetune_esc10.py --ckpt=out/real/ckpt.pt

What it costs: 200 updates of 16 clips. Time with the model of config/real.py: a minute and a half on one CPU core.
What to expect: the table in the README's results.
"""
out_dir = 'out/finetune_esc10'
dataset = 'esc10'
fold = '5'
frames = 496                    # 5 s
max_steps = 200
batch_size = 16
warmup_steps = 20
lr = 1e-3
layer_decay = 1.0               # few layers
pooling = 'mean'                # better than CLS on the validation part
roll = True
label_smoothing = 0.1
eval_interval = 100
log_interval = 50
workers = 0
