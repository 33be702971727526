"""What a sample is conditioned on: one file per condition."""
