"""What a sample is: one folder per modality. A modality is data, not a network."""
