"""AudioSet-20K, its balanced part, 527 classes, several per clip: mAP (paper: 41.5).

    python prepare.py audioset --source=AUDIO --segments=balanced_train_segments.csv
    python prepare.py audioset --source=AUDIO --segments=eval_segments.csv
    python finetune.py config/finetune_as20k.py --ckpt=out/as2m/ckpt.pt

What it costs: 60,000 updates of 32 ten-second clips, 6e17 floating-point operations by count. Time: not measured.
What to expect: the paper reports 41.5 mAP; we have not run it. Window, frames and architecture come from the
checkpoint. Values are those of the authors' scripts, unless a comment says otherwise.
"""
include('finetune_authors.py')

out_dir = 'out/finetune_as20k'
dataset = 'as20k'
test_dataset = 'as_eval'        # the official evaluation list, 20,371 segments
validation_part = 0.05          # ours: some 1,000 clips choose the best checkpoint (0: train on all, test the last)
batch_size = 32
max_steps = 60_000
warmup_steps = 6_000
eval_interval = 2_000           # ours
save_interval = 1_000           # ours
