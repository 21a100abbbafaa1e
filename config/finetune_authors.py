"""What the fine-tunings of a base model share: the values of the authors' scripts, unless a comment says otherwise. The
paper gives hardly any.

Built on by finetune_as2m.py, finetune_as20k.py, finetune_spc2.py and finetune_esc50.py, which say what each costs, how
much time it takes and what to expect.
"""
lr = 5e-5
min_lr = 1e-6
layer_decay = 0.65
beta1, beta2 = 0.9, 0.95
weight_decay = 0.05             # paper, section 3
drop_path = 0.1
mixup = 0.8                     # Beta(0.8, 0.8) ...
mixup_probability = 0.9         # ... in nine batches of ten
input_mask = 0.2                # paper, section 3: "input masking ratio 0.2"
label_smoothing = 0.0
roll = True
noise = False
weighted = False                # uniform
loss = 'bce'                    # sum over classes and clips / sum of the labels
log_interval = 100              # ours
workers = 8                     # ours
compile = True                  # ours
