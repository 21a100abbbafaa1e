"""AudioSet-2M as the authors' released code does it, where it differs from the paper (docs/paper_and_code.md).

    torchrun --nproc_per_node=4 pretrain.py config/as2m_authors.py

What it costs, how long it takes: as config/as2m.py (512 instead of 504 patches: 2 % more). What to expect: the
paper's figures come from this code; we have not run it to the end. Time per step: see config/as2m.py.
"""
include('as2m.py')

out_dir = 'out/as2m_authors'
window = 'hanning'
frames = 1024                                   # 64 x 8 patches
pos_embed = '2d'
n_head = 12
diff_lambda = 0.1
head_norm, attn_scale = 'all', 0.95
decay_vectors = True
max_steps = 800_000
warmup_steps = 106_666
