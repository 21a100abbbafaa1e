"""AudioSet-2M as the paper describes it: ASDA base on 1,912,134 ten-second clips.

    torchrun --nproc_per_node=4 pretrain.py config/as2m.py

What it costs: 796,722 updates of 48 clips x 16 students, about 4.5e19 floating-point operations by count, 1.17e12 a
clip. The data take 612 GB as packed 16-bit PCM. Time: not measured by us with this code; the
authors' code reaches 90 clips/s on one H100, which is 118 hours for the 38 million clips. What to expect: 49.0 mAP on
AudioSet and 41.5 on its balanced part after fine-tuning (the paper's Table 1); we have not run it to the end.
"""
out_dir = 'out/as2m'
dataset = 'as2m'
norm_mean, norm_std = -4.268, 4.569             # AudioSet's, as published
frames = 1008                                   # 63 x 8 patches
batch_size = 48                                 # 4 GPUs x 12 clips
max_steps = 20 * 1_912_134 // batch_size        # 20 epochs
warmup_steps = int(2.5 * 1_912_134 / batch_size)
lr = 5e-4
weight_decay = 0.05
ema_start, ema_end, ema_steps = 0.9998, 0.99999, 100_000
utterance_scale = 192.0                         # not in the paper, but in its runs (docs/paper_and_code.md)
log_interval = 50
save_interval = 2000
workers = 8
compile = True
