"""26 hours of real sounds, unlabelled: words and sentences of some hundred voices, instruments, ambience, cries,
ESC-10, with what is tested left out.

    python pretrain.py config/real.py
    python pretrain.py config/real.py --dataset=wakewords,fsdd,esc10        # 2.9 hours of them, which results need

docs/datasets.md says how to get and prepare the sets. What it costs: 3,500 updates of 32 clips x 4 students. Time: half
an hour on one core of an AMD EPYC with bfloat16; --compile spares a fifth of it. What to expect: docs/results.md. How
the recipe was found: docs/recipe.md.
"""
include('demo.py')

out_dir = 'out/real'
dataset = 'wakewords,fsdd,esc10,kerstin,kathleen,intent,cmn,philharmonia,tonejs,muldjord,moodist,donateacry'
leave_out = 'fsdd/theo,esc10/5'         # and every set's test split, which `splits` does not name
eval_dataset = 'wakewords'
short_clips = 'join'                    # most digits are shorter than half a second
pos_embed = '2d'                        # carries over to longer inputs
patch_frames = 8                        # 80 ms: digits and words last a few patches of 160
max_steps = 3500
lr = 2e-3
warmup_steps = 200
ema_start, ema_end, ema_steps = 0.998, 0.9998, max_steps
eval_interval = 1000
save_interval = 250
