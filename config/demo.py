"""Ten classes of synthetic sounds on a small model."""
out_dir = 'out/demo'
dataset = eval_dataset = 'demo'
frames = 128
n_layer, n_head, n_embd = 4, 4, 128
decoder_layers = 3
n_students = 8
mask_block = 3
batch_size = 32
max_steps = 1000
warmup_steps = 100
lr = 1e-3
ema_start, ema_end, ema_steps = 0.99, 0.999, max_steps
eval_interval = 250
save_interval = 250
workers = 0
