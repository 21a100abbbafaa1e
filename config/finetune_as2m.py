"""AudioSet-2M, 527 classes, several per clip: mAP (paper: 49.0).

    python prepare.py audioset --source=AUDIO --segments=balanced_train_segments.csv,unbalanced_train_segments.csv
    python prepare.py audioset --source=AUDIO --segments=eval_segments.csv
    torchrun --nproc_per_node=4 finetune.py config/finetune_as2m.py --ckpt=out/as2m/ckpt.pt

What it costs: 600,000 updates of 48 ten-second clips, 1e19 floating-point operations by count. Time: not measured.
What to expect: the paper reports 49.0 mAP; we have not run it. Window, frames and architecture come from the
checkpoint. The paper gives no values for fine-tuning: those below are the authors' scripts', unless a
comment says otherwise.
"""
out_dir = 'out/finetune_as2m'
dataset = 'as2m'
test_dataset = 'as_eval'        # the official evaluation list, 20,371 segments
validation_part = 0.005         # ours: some 9,500 clips choose the best checkpoint (0: train on all, test the last)
batch_size = 48
lr = 5e-5
min_lr = 1e-6
max_steps = 600_000
warmup_steps = 60_000
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
weighted = True                 # by AudioMAE's formula; the authors' file of weights is not public
epoch_clips = 200_000
loss = 'bce'                    # sum over classes and clips / sum of the labels
eval_interval = 20_000          # ours
save_interval = 5_000           # ours
log_interval = 100              # ours
workers = 8                     # ours
compile = True                  # ours
