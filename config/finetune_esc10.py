"""ESC-10, ten environmental sounds, 5 s each, one fold.

    python prepare.py esc50 --source=ESC-10.tar --out_dir=data/esc10
    python finetune.py config/finetune_esc10.py --ckpt=out/real/ckpt.pt

What it costs: 200 updates of 16 clips. Time with the model of config/real.py: four minutes on one CPU core. What to
expect: 90 %, from scratch 87 (docs/results.md).
"""
include('finetune_small.py')

out_dir = 'out/finetune_esc10'
dataset = 'esc10'
fold = '5'
frames = 496                    # 5 s
max_steps = 200
batch_size = 16
roll = True
