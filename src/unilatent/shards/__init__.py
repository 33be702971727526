"""Samples in tar shards (WebDataset format), read by index. A sample is the tar members that share a key."""
