"""Ten classes of synthetic sounds on a small model: to see that it works, and to hack.

    python pretrain.py config/demo.py

What it costs: 600 updates of 32 clips x 8 students. Time: 1 m 41 s on two CPU cores with
bfloat16 instructions, with the making of the data. What to expect: an explained share of 96 % and a kNN accuracy of
18 / 16 % (CLS / patches; chance 12 %) at the end. So few updates teach where a patch lies more than what it holds: the
linear probe of the CLS has 39 %, that of log-mel statistics 48 %.
"""
out_dir = 'out/demo'
dataset = eval_dataset = 'demo'
frames = 128
n_layer, n_head, n_embd = 4, 4, 128
decoder_layers = 3
n_students = 8
mask_block = 3
batch_size = 32
max_steps = 600
warmup_steps = 60
lr = 1e-3
ema_start, ema_end, ema_steps = 0.99, 0.999, max_steps
eval_interval = 150
save_interval = 150
workers = 0
