"""AudioSet-2M, 527 classes, several per clip: mAP (paper: 49.0).

    python prepare.py audioset --source=AUDIO --segments=balanced_train_segments.csv,unbalanced_train_segments.csv
    python prepare.py audioset --source=AUDIO --segments=eval_segments.csv
    torchrun --nproc_per_node=4 finetune.py config/finetune_as2m.py --ckpt=out/as2m/ckpt.pt

What it costs: 600,000 updates of 48 ten-second clips, 1e19 floating-point operations by count. Time: not measured.
What to expect: the paper reports 49.0 mAP; we have not run it. Window, frames and architecture come from the
checkpoint. Values are those of the authors' scripts, unless a comment says otherwise.
"""
include('finetune_authors.py')

out_dir = 'out/finetune_as2m'
dataset = 'as2m'
test_dataset = 'as_eval'        # the official evaluation list, 20,371 segments
validation_part = 0.005         # ours: some 9,500 clips choose the best checkpoint (0: train on all, test the last)
batch_size = 48
max_steps = 600_000
warmup_steps = 60_000
weighted = True                 # by AudioMAE's formula; the authors' file of weights is not public
epoch_clips = 200_000
eval_interval = 20_000          # ours
save_interval = 5_000           # ours
