"""Training: the adapter (`module`, `dataset`), and the embedded base it runs on (`pretrain`, `embedded`)."""
