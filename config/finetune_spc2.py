"""Speech Commands v2, 35 words, one second each, official split: accuracy (paper: 98.3 %).

    python prepare.py speechcommands
    python finetune.py config/finetune_spc2.py --ckpt=out/as2m/ckpt.pt

What it costs: 80,000 updates of 256 one-second clips, 8e17 floating-point operations by count. Time: not measured.
What to expect: the paper reports 98.3 %; we have not run it. Window and architecture come from the checkpoint. Values
are those of the authors' scripts, unless a comment says otherwise.
"""
include('finetune_authors.py')

out_dir = 'out/finetune_spc2'
dataset = 'speechcommands'
frames = 128                    # 98 of a second, padded
batch_size = 256
lr = 2e-4
max_steps = 80_000
warmup_steps = 8_000
label_smoothing = 0.0           # the scripts set 0.1, which their code does not use here
noise = True
loss = 'bce'                    # on the mixed labels: sum over classes, mean over clips
eval_interval = 2_000           # ours
save_interval = 1_000           # ours
