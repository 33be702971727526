"""Samples in tar shards (WebDataset's layout), read by index: a sample is the members that share a key."""
