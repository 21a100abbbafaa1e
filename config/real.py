"""Speech and environmental sounds, unlabelled: wakewords, spoken digits and ESC-10 together, with what is tested left
out.

    python pretrain.py config/real.py

What it costs: 7,000 updates of 24 clips x 8 students. Time: 39 minutes on one CPU core with bfloat16
instructions. What to expect: the README's results.
"""
include('demo.py')

out_dir = 'out/real'
dataset = 'wakewords,fsdd,esc10'
leave_out = 'fsdd/theo,esc10/5'         # and every set's test split, which `splits` does not name
eval_dataset = 'wakewords'
short_clips = 'join'                    # most digits are shorter than half a second
pos_embed = '2d'                        # carries over to longer inputs
n_layer, n_head, n_embd = 4, 6, 192
batch_size = 24
max_steps = 7000
warmup_steps = 400
lr = 7e-4
ema_start, ema_end, ema_steps = 0.995, 0.9995, max_steps
eval_interval = 500
save_interval = 250
