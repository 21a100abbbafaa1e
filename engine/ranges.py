"""The numbers that settings may be: (lowest, highest), both included, for configurator.check_ranges."""

RUN = {'batch_size': (1, 1e6), 'accumulate': (1, 1e6), 'max_steps': (1, 1e9), 'warmup_steps': (0, 1e9),
       'lr': (0, 1e30), 'weight_decay': (0, 1e3), 'beta1': (0, 0.9999), 'beta2': (0, 0.999999),
       'log_interval': (1, 1e9), 'save_interval': (1, 1e9), 'keep': (1, 100), 'max_bad_steps': (1, 1e9),
       'seed': (0, 2 ** 32 - 1), 'workers': (0, 1000), 'threads': (0, 1000)}
PRETRAIN = {**RUN, 'norm_mean': (-100, 100), 'norm_std': (1e-3, 100), 'grad_clip': (0, 1e9), 'ema_start': (0, 1),
            'ema_end': (0, 1), 'ema_steps': (1, 1e9), 'min_target_var': (0, 1), 'eval_interval': (0, 1e9)}
FINETUNE = {**RUN, 'min_lr': (0, 1e30), 'layer_decay': (0, 1), 'labels_per_class': (0, 1e9), 'mixup': (0, 1e3),
            'mixup_probability': (0, 1), 'input_mask': (0, 1), 'label_smoothing': (0, 1), 'validation_part': (0, 1),
            'frames': (0, 1e6), 'epoch_clips': (1, 1e9), 'eval_interval': (1, 1e9)}
