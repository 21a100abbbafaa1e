"""What running needs and the method does not: processes, precision, signals, files, checkpoints, the log, errors."""
