"""What tools.ablations runs: config/real.py with square patches, as the paper has them, in half the time.

    python -m tools.ablations
    python pretrain.py config/ablation.py --diff_lambda=0

What it costs: 300 updates of 32 clips x 4 students. Time: a minute and a half on one CPU core. What to expect:
docs/ablations.md.
"""
include('real.py')

out_dir = 'out/ablation'
patch_frames = 16
max_steps = 300
warmup_steps = 30
ema_steps = max_steps
eval_interval = 300
