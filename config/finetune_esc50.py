"""ESC-50, fifty environmental sounds, five seconds each, five folds: accuracy (paper: 96.1 %).

    python prepare.py esc50
    python finetune.py config/finetune_esc50.py --ckpt=out/as2m/ckpt.pt --fold=all

What it costs: 4,000 updates of 48 five-second clips for each fold, 1.5e17 floating-point operations by count in all.
Time: not measured. What to expect: the paper reports 96.1 %; we have not run it. Window and architecture come from the
checkpoint. Values are those of the authors' scripts, unless a comment says otherwise.
"""
include('finetune_authors.py')

out_dir = 'out/finetune_esc50'
dataset = 'esc50'
fold = 'all'                    # five runs; their accuracies, mean and standard deviation
validation_part = 0.1           # ours: a tenth of the four folds chooses the best checkpoint (0: train on all of them)
frames = 512                    # 498 of five seconds, padded
batch_size = 48
max_steps = 4_000
warmup_steps = 400
mixup = 0.0                     # none
input_mask = 0.4
label_smoothing = 0.1
loss = 'cross_entropy'          # mean over clips
eval_interval = 200             # ours
save_interval = 200             # ours
log_interval, workers, compile = 20, 2, False     # ours: short runs
