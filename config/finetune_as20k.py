"""AudioSet-20K, its balanced part, 527 classes, several per clip: mAP (paper: 41.5).

    python prepare.py audioset --source=AUDIO --segments=balanced_train_segments.csv
    python prepare.py audioset --source=AUDIO --segments=eval_segments.csv
    python finetune.py config/finetune_as20k.py --ckpt=out/as2m/ckpt.pt

What it costs: 60,000 updates of 32 ten-second clips, 6e17 floating-point operations by count. Time: not measured.
What to expect: the paper reports 41.5 mAP; we have not run it. Window, frames and architecture come from the
checkpoint. The paper gives no values for fine-tuning: those below are the authors' scripts', unless a
comment says otherwise.
"""
out_dir = 'out/finetune_as20k'
dataset = 'as20k'
test_dataset = 'as_eval'        # the official evaluation list, 20,371 segments
validation_part = 0.05          # ours: some 1,000 clips choose the best checkpoint (0: train on all, test the last)
batch_size = 32
lr = 5e-5
min_lr = 1e-6
max_steps = 60_000
warmup_steps = 6_000
layer_decay = 0.65
beta1, beta2 = 0.9, 0.95
weight_decay = 0.05             # paper, section 3
drop_path = 0.1
mixup = 0.8                     # Beta(0.8, 0.8) ...
mixup_probability = 0.9         # ... in nine batches of ten
input_mask = 0.2                # paper, section 3: "input masking ratio 0.2"
label_smoothing = 0.0
roll = True
noise = False
weighted = False                # uniform
loss = 'bce'                    # sum over classes and clips / sum of the labels
eval_interval = 2_000           # ours
save_interval = 1_000           # ours
log_interval = 100              # ours
workers = 8                     # ours
compile = True                  # ours
